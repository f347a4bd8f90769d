"""Time of the CPU path on a quiet machine and beside other programs. Prints Markdown.

Idle threads of torch spin for 3 ms, as GNU OpenMP does by default, for 50 µs, or for 10 µs, in turn.

nice -n -10 .venv/bin/python -m benchmarks.busy step rollouts demo

The other programs are two processes that multiply matrices with torch on 2 threads each. On 2 cores the fair share of a
third such process is a third, so beside them everything should take 3 times as long as alone.

- step: a training step of SmolLM2-135M over 8 rollouts with a common prompt (shape a of `benchmarks.trainer`)
- rollouts: an evaluation of the demo's tiny model on its held-out tasks
- demo: `agl demo --tiny`, without its report
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from benchmarks.background import running_beside

SETTINGS = {"3 ms": "300000", "50 µs": "5000", "10 µs": "1000"}
"""Time that an idle thread spins, as `GOMP_SPINCOUNT`."""
SITUATIONS = {"quiet": 0, "busy": 2}
"""Number of other programs."""
_LIMIT_S = 600.0
_OTHER = """
import torch
torch.set_num_threads(2)
one, other = torch.randn(768, 768), torch.randn(768, 768)
while True:
    one @ other
"""


def measure_step() -> float:
    from benchmarks.step_rows import SHAPES
    from benchmarks.trainer import WAYS, _stepper

    take = _stepper(SHAPES["a"], WAYS["a"][0])
    take(0)  # warms up
    return take(0).seconds


def measure_rollouts() -> float:
    from agl_trainer.loop.trainer import Trainer

    with tempfile.TemporaryDirectory() as folder, Trainer(_demo(folder).config).open() as trainer:
        started = time.perf_counter()
        trainer.evaluate("timed")
        return time.perf_counter() - started


def measure_demo() -> float:
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        _demo(folder).run()
        return time.perf_counter() - started


def _demo(folder: str):  # type: ignore[no-untyped-def]  # imported late: torch reads its settings when it is loaded
    from agl_trainer.loop.demo import Demo

    return Demo.of(Path("examples/sql_agent/tiny.yaml"), Path(folder), seed=0)


MEASURES = {"step": measure_step, "rollouts": measure_rollouts, "demo": measure_demo}


@contextmanager
def _others(count: int) -> Iterator[None]:
    with running_beside([[sys.executable, "-c", _OTHER]] * count):
        if count:
            time.sleep(5)  # until they have loaded torch
        yield


def _seconds(name: str, spins: str) -> float:
    """The measure in a process of its own; infinite if that is not done in time."""
    command = [sys.executable, "-m", "benchmarks.busy", "--measure", name]
    environment = os.environ | {"GOMP_SPINCOUNT": spins}
    try:
        done = subprocess.run(
            command,
            env=environment,
            check=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=_LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        return float("inf")
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=MEASURES)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--measure", action="store_true", help="measure one in this process, and print seconds")
    arguments = parser.parse_args()
    if arguments.measure:
        print(MEASURES[arguments.names[0]]())
        return
    print("| | idle threads spin | quiet | busy | busy / (3 quiet) |\n|---|---:|---:|---:|---:|")
    for name in arguments.names:
        found: dict[tuple[str, str], list[float]] = {}
        for _ in range(arguments.rounds):
            for situation, count in SITUATIONS.items():
                for label, spins in SETTINGS.items():
                    with _others(count):
                        found.setdefault((situation, label), []).append(_seconds(name, spins))
        best = min(median(found["quiet", label]) for label in SETTINGS)
        for label in SETTINGS:
            quiet, busy = (median(found[situation, label]) for situation in SITUATIONS)
            print(f"| {name} | {label} | {quiet:.1f} s | {busy:.1f} s | {busy / (3 * best):.2f} |", flush=True)


if __name__ == "__main__":
    main()
