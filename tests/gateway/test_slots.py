"""Places at an engine: never too many, and rollouts take turns."""

import asyncio

import pytest

from agl.gateway.fair_queue import Slots


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_rollout_with_many_calls_does_not_keep_others_waiting() -> None:
    slots, order = Slots(1), list[str]()

    async def call(rollout: str) -> None:
        await slots.take(rollout)
        order.append(rollout)
        await settle()
        slots.give_back()

    await slots.take("first")
    calls = [asyncio.create_task(call(rollout)) for rollout in ["big"] * 4 + ["small", "other", "small"]]
    await settle()
    assert (slots.in_use, slots.waiting) == (1, 7)
    slots.give_back()
    await asyncio.gather(*calls)
    assert order == ["big", "small", "other", "big", "small", "big", "big"]
    assert (slots.in_use, slots.waiting) == (0, 0)


async def test_there_are_never_more_than_the_limit() -> None:
    slots, most = Slots(3), 0

    async def call(number: int) -> None:
        nonlocal most
        await slots.take(str(number % 4))
        most = max(most, slots.in_use)
        await asyncio.sleep(0)
        slots.give_back()

    await asyncio.gather(*map(call, range(50)))
    assert (most, slots.in_use) == (3, 0)


@pytest.mark.parametrize("handed_over", [False, True])
async def test_who_leaves_the_queue_takes_no_place_along(handed_over: bool) -> None:
    slots = Slots(1)
    await slots.take("a")
    leaving, staying = (asyncio.create_task(slots.take(name)) for name in ("b", "c"))
    await settle()
    if handed_over:
        slots.give_back()
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    if not handed_over:
        slots.give_back()
    await staying
    assert (slots.in_use, slots.waiting) == (1, 0)
    slots.give_back()
    assert slots.in_use == 0
