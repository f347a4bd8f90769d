"""Ingest rate of collectors, until all spans can be queried: ours, its upper bounds, and peers. Prints Markdown.

.venv/bin/python -m benchmarks.ingest
.venv/bin/python -m benchmarks.ingest --quick --only SQLite
.venv/bin/python -m benchmarks.ingest --peers --corpus tokens --batch 512 --spans 1024

This process is the sender and shares the cores with the receiver. The clock runs from the first byte sent until the
receiver counts all spans. Every round measures the upper bounds (`benchmarks/floors.py`) and the receivers in turn,
each with a new store. The table has medians over rounds, also of ratios.
"""

import argparse
import os
import platform
import sqlite3
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Final

import psutil
from google.protobuf.internal import api_implementation

from benchmarks import floors
from benchmarks.corpus import Body, Corpus, bodies
from benchmarks.receivers import OURS, PEERS, Receiver, Running
from benchmarks.sender import Sender
from tests.waiting import wait_until

_WARM_UP: Final = 160
"""Spans, in requests of 8."""


@dataclass(frozen=True, slots=True)
class Load:
    """Spans of a corpus in batches of a size, over a number of connections."""

    corpus: Corpus
    batch: int
    connections: int


LOADS: Final = tuple(Load(corpus, batch, n) for corpus in ("tokens", "light") for batch in (512, 8) for n in (1, 4))


@dataclass(frozen=True, slots=True)
class Result:
    """Measurements of one load on one receiver."""

    spans_per_s: float
    """From the first byte sent until all spans can be queried."""
    of_floor: float
    p50_ms: float
    p99_ms: float
    peak_mb: float
    """Peak resident memory, summed over all processes of the receiver."""


def measure(receiver: Receiver, load: Load, spans: int, floor: float) -> Result:
    """Send a load to a newly started server. `floor` is the upper bound in spans per second."""
    with tempfile.TemporaryDirectory() as folder, receiver.start(Path(folder)) as running:
        _send(running, list(bodies("light", _WARM_UP, 8, running.resources)), load.connections)
        _await(running, _WARM_UP)
        made = list(bodies(load.corpus, spans, load.batch, running.resources, first=_WARM_UP))
        begin = time.perf_counter()
        sender = _send(running, made, load.connections)
        _await(running, _WARM_UP + spans)
        rate = spans / (time.perf_counter() - begin)
        latencies = sorted(latency * 1000 for latency in sender.latencies_s)
        p99 = latencies[min(len(latencies) - 1, int(len(latencies) * 0.99))]
        return Result(rate, rate / floor, median(latencies), p99, peak_mb(running.pid))


def _send(running: Running, made: Sequence[Body], connections: int) -> Sender:
    sender = Sender(running.url, made, connections, running.headers)
    sender.send()
    return sender


def _await(running: Running, spans: int) -> None:
    wait_until(lambda: running.count() >= spans, timeout_s=120)


def peak_mb(pid: int) -> float:
    """Sum of the peak resident memory of a process and its children. Shared pages count once per process."""
    process = psutil.Process(pid)
    total = 0
    for one in (process, *process.children(recursive=True)):
        status = Path(f"/proc/{one.pid}/status").read_text()
        total += int(status.partition("VmHWM:")[2].split()[0])
    return total / 1024


def run(receivers: Sequence[Receiver], loads: Sequence[Load], spans: int, rounds: int) -> None:
    results: dict[tuple[Load, str], list[Result]] = defaultdict(list)
    below: dict[tuple[Corpus, int], list[dict[str, float]]] = defaultdict(list)
    for _ in range(rounds):
        for load in loads:
            with tempfile.TemporaryDirectory() as folder:
                floor = floors.measure(list(bodies(load.corpus, spans, load.batch)), Path(folder))
            below[load.corpus, load.batch].append(floor)
            for receiver in receivers:
                results[load, receiver.name].append(measure(receiver, load, spans, floor["store"]))
    _print(spans, rounds, below, results)


def _print(
    spans: int,
    rounds: int,
    below: dict[tuple[Corpus, int], list[dict[str, float]]],
    results: dict[tuple[Load, str], list[Result]],
) -> None:
    print(
        f"{spans:,} spans, median of {rounds}. Python {platform.python_version()}, SQLite {sqlite3.sqlite_version},"
        f" protobuf {version('protobuf')} ({api_implementation.Type()}); load {os.getloadavg()[0]:.1f}.\n"
    )
    print("| floor, spans/s | batch | parse | store | append |\n|---|---:|---:|---:|---:|")
    for (corpus, batch), found in below.items():
        print(f"| {corpus} | {batch} | " + " | ".join(f"{_median(found, name):,.0f}" for name in found[0]) + " |")
    print("\n| receiver | corpus | batch | connections | spans/s | of `store` | p50 ms | p99 ms | peak MB |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for (load, name), taken in results.items():
        rate, of_floor, p50, p99, peak = (
            median(getattr(result, field) for result in taken) for field in Result.__dataclass_fields__
        )
        print(
            f"| {name} | {load.corpus} | {load.batch} | {load.connections} | {rate:,.0f} | {of_floor:.2f} | {p50:.1f} |"
            f" {p99:.1f} | {peak:,.0f} |"
        )


def _median(found: Sequence[dict[str, float]], name: str) -> float:
    return median(floor[name] for floor in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--spans", type=int, default=20_480)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="5,120 spans, one round")
    parser.add_argument("--peers", action="store_true", help="also install and measure the collectors of peers")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="receivers whose names contain one of these words")
    parser.add_argument("--corpus", choices=("tokens", "light"), help="only this corpus (default: both)")
    parser.add_argument("--batch", type=int, choices=(512, 8), help="spans per request (default: both)")
    arguments = parser.parse_args()
    wanted = [
        receiver
        for receiver in (*OURS, *(PEERS if arguments.peers else ()))
        if arguments.only is None or any(word in receiver.name for word in arguments.only)
    ]
    loads = [
        load for load in LOADS if arguments.corpus in (None, load.corpus) and arguments.batch in (None, load.batch)
    ]
    run(wanted, loads, *((5_120, 1) if arguments.quick else (arguments.spans, arguments.rounds)))


if __name__ == "__main__":
    main()
