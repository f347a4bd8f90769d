"""A thousand rollouts with open streams at once, on `agl serve` in a separate process.

This takes longer than other tests: four thousand streams, on two cores that clients and engine share with the gateway.
"""

from pathlib import Path

from benchmarks.gateway import count_right, load, null_engine, ours
from benchmarks.process import memory_mb

ROLLOUTS, WAVES = 1000, 4
GROWTH_MB = 30
"""Most that the process may grow by from the second wave to the last: 15 KB a call."""


def test_no_call_is_lost_each_has_its_own_tokens_and_memory_is_flat(tmp_path: Path) -> None:
    memory: list[float] = []
    with null_engine() as engine, ours(tmp_path, engine) as (url, process, store):
        for wave in range(WAVES):
            load(url, ROLLOUTS, wave, 0, "rollout")
            memory.append(memory_mb(process.pid).whole)
        assert count_right(store, ROLLOUTS, WAVES) == ROLLOUTS * WAVES
    assert memory[-1] - memory[1] < GROWTH_MB, memory
