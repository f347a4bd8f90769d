"""A program whose rollouts work in other processes. Arguments: kind of pool, start method, URL of the collector."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.context import BaseContext
from typing import Any

from opentelemetry import trace

import agl

ROLLOUTS = ("r1", "r2", "r3")


def redact(text: str) -> str:
    return text.replace("Ada", "***")


def work(name: str) -> str | None:
    """A span of somebody else's, a reward in dimensions, and what rollout the worker thinks it is in."""
    trace.get_tracer("the user's own").start_span(name).end()
    agl.emit_reward({"goal": 1, "style": 0}, attributes={"judge": "Ada"})
    active = agl.current_rollout()
    return active.rollout_id if active else None


def executor(context: BaseContext) -> None:
    """One pool for all: its workers outlive the rollouts, and one was forked in the first."""
    futures: list[Future[str | None]] = []
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        for name in ROLLOUTS:
            with agl.rollout(name), agl.role("planner"):
                futures.append(pool.submit(agl.carry(work), name))
    assert [future.result() for future in futures] == [*ROLLOUTS]


def pool(context: BaseContext) -> None:
    """A pool that kills its workers at the end."""
    with context.Pool(2) as pool:
        for name in ROLLOUTS:
            with agl.rollout(name), agl.role("planner"):
                assert pool.map(agl.carry(work), [name]) == [name]


def process(context: BaseContext) -> None:
    run_processes(context, agl.carry)


def bare(context: BaseContext) -> None:
    """A forked process is in its rollout without being told; its parent has a connection open."""
    agl.emit_message("started")
    agl.flush()
    run_processes(context, lambda function: function)


def run_processes(context: BaseContext, carry: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    for name in ROLLOUTS:
        with agl.rollout(name), agl.role("planner"):
            worker = context.Process(target=carry(work), args=(name,))  # type: ignore[attr-defined]  # typeshed
            worker.start()
        worker.join()
        assert worker.exitcode == 0


def program(_context: BaseContext) -> None:
    """Another program, started with our environment."""
    for name in ROLLOUTS:
        with agl.rollout(name), agl.role("planner"):
            command = [sys.executable, __file__, "child", "", sys.argv[3], name]
            subprocess.run(command, env=os.environ | agl.environment(), check=True)


if __name__ == "__main__":
    weights = {"goal": 0.75, "style": 0.25}
    agl.init("pools", endpoint=sys.argv[3], reward_weights=weights, redact=redact)
    if sys.argv[1] == "child":
        assert work(sys.argv[4]) == sys.argv[4]
    else:
        kinds = {"executor": executor, "pool": pool, "process": process, "bare": bare, "program": program}
        kinds[sys.argv[1]](multiprocessing.get_context(sys.argv[2]))
