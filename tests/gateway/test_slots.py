"""The queue of an engine: never more calls than the limit, and rollouts take turns."""

import asyncio

import pytest

from agl.gateway.engine import FairQueue


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_rollout_with_many_calls_does_not_delay_the_others() -> None:
    queue, order = FairQueue(1), list[str]()

    async def call(rollout: str) -> None:
        await queue.acquire(rollout)
        order.append(rollout)
        await settle()
        queue.release()

    await queue.acquire("first")
    calls = [asyncio.create_task(call(rollout)) for rollout in ["big"] * 4 + ["small", "other", "small"]]
    await settle()
    assert (queue.in_use, queue.waiting) == (1, 7)
    queue.release()
    await asyncio.gather(*calls)
    assert order == ["big", "small", "other", "big", "small", "big", "big"]
    assert (queue.in_use, queue.waiting) == (0, 0)


async def test_there_are_never_more_calls_than_the_limit() -> None:
    queue, most = FairQueue(3), 0

    async def call(number: int) -> None:
        nonlocal most
        await queue.acquire(str(number % 4))
        most = max(most, queue.in_use)
        await asyncio.sleep(0)
        queue.release()

    await asyncio.gather(*map(call, range(50)))
    assert (most, queue.in_use) == (3, 0)


@pytest.mark.parametrize("handed_over", [False, True])
async def test_a_cancelled_waiter_does_not_keep_a_slot(handed_over: bool) -> None:
    queue = FairQueue(1)
    await queue.acquire("a")
    leaving, staying = (asyncio.create_task(queue.acquire(name)) for name in ("b", "c"))
    await settle()
    if handed_over:
        queue.release()
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    if not handed_over:
        queue.release()
    await staying
    assert (queue.in_use, queue.waiting) == (1, 0)
    queue.release()
    assert queue.in_use == 0
