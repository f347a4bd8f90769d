"""Agent and reward functions as users write them, good and bad. The task is a number."""

import asyncio
import sys
import threading

import agl

release = threading.Event()
"""Set at the end of a test, so that what hangs ends with it."""


def double(task: int) -> int:
    with agl.role("writer"):
        agl.emit_message(f"doubling {task}")
    return 2 * task


async def double_async(task: int) -> int:
    await asyncio.sleep(0.01)
    return await asyncio.to_thread(double, task)


def raise_on_odd(task: int) -> int:
    if task % 2:
        raise ValueError(f"{task} is odd")
    return task


async def leave_on_odd(task: int) -> int:
    await asyncio.sleep(0)
    if task % 2:
        sys.exit(3)
    return task


def hang_on_odd(task: int) -> int:
    if task % 2:
        release.wait()
        agl.emit_message("too late")
    return task


async def hang_async_on_odd(task: int) -> int:
    if task % 2:
        await asyncio.Event().wait()
    return task


async def hang_in_a_thread_on_odd(task: int) -> int:
    if task % 2:
        await asyncio.to_thread(release.wait)
    return await asyncio.to_thread(int, task)


async def block_the_loop_on_odd(task: int) -> int:
    if task % 2:
        release.wait()
    await asyncio.sleep(0)
    return task


async def which_loop(task: int) -> int:
    return id(asyncio.get_running_loop())


def closeness(task: int, answer: int) -> dict[str, float]:
    return {"goal": float(answer == 2 * task), "speed": 0.5}


async def judge_forever(task: int, answer: int) -> float:
    await asyncio.Event().wait()
    return 0.0


async def judge(task: int, answer: int) -> float:
    await asyncio.sleep(0)
    return answer / 10
