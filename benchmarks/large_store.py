"""A store with many spans: memory of the collector while they arrive, then the time to read a group as trajectories.
Prints Markdown.

.venv/bin/python -m benchmarks.large_store --spans 2_000_000
.venv/bin/python -m benchmarks.large_store --postgres
"""

import argparse
import contextlib
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from statistics import median
from typing import Final

from agl import semconv
from agl.page.rollouts import PAGE_ROLLOUTS, Filters, list_page
from agl.span import Span
from agl.store import Store, open_store
from agl.trajectory import build_trajectory
from benchmarks.corpus import bodies
from benchmarks.ingest import peak_mb
from benchmarks.sender import Sender
from tests.core.span_maker import gateway_call, span
from tests.store.postgres_server import running_postgres
from tests.store.serving import serving

_STEPS: Final = 10
_ROLLOUTS, _CALLS = 8, 20
_READS: Final = 9


def fill(url: str, pid: int, spans: int) -> None:
    """Send `spans` spans over four connections and print a line after each tenth."""
    print("| spans | spans/s | peak MB |\n|---:|---:|---:|")
    size = spans // _STEPS // 512 * 512
    for step in range(_STEPS):
        begin = time.perf_counter()
        Sender(url, list(bodies("tokens", size, 512, first=step * size)), 4).send()
        rate = size / (time.perf_counter() - begin)
        print(f"| {(step + 1) * size:,} | {rate:,.0f} | {peak_mb(pid):,.0f} |", flush=True)


def add_group(store: Store) -> list[str]:
    """Append rollouts in which each call's prompt continues the previous one (1,000 tokens on average). Returns ids."""
    names = [f"read-{number}" for number in range(_ROLLOUTS)]
    for number, name in enumerate(names):
        store.append_spans([_named(one, name) for one in _rollout(f"{number + 1:032x}")])
    return names


def _named(one: Span, rollout_id: str) -> Span:
    return replace(one, attributes={**one.attributes, semconv.ROLLOUT_ID: rollout_id})


def _rollout(trace_id: str) -> Iterator[Span]:
    root = span("invoke_agent solver", trace_id=trace_id)
    yield root
    tokens = list(range(300))
    for _ in range(_CALLS):
        answer = list(range(60))
        yield gateway_call(tokens, answer, parent=root, role="solver")
        tokens += [*answer, *range(20)]


def read(store: Store, rollout_ids: list[str]) -> tuple[float, float]:
    """Build the trajectories of the rollouts. Returns the wall time and the CPU time in ms."""
    begin, begin_cpu = time.perf_counter(), time.process_time()
    built = [build_trajectory(store.query_spans(rollout_id)) for rollout_id in rollout_ids]
    took_ms = (time.perf_counter() - begin) * 1000, (time.process_time() - begin_cpu) * 1000
    assert [len(trajectory.calls) for trajectory in built] == [_CALLS] * _ROLLOUTS
    return took_ms


def list_first(store: Store) -> float:
    """Wall time in ms to find and summarize the rollouts of the page's first list."""
    begin = time.perf_counter()
    assert len(list_page(store, Filters.of({}), None).rollouts) == PAGE_ROLLOUTS
    return (time.perf_counter() - begin) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--spans", type=int, default=1_000_000)
    parser.add_argument("--postgres", action="store_true", help="in a PostgreSQL server of its own, without fsync")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as opened:
        if arguments.postgres:
            uri = opened.enter_context(running_postgres()).new_database()
        else:
            uri = f"sqlite:///{opened.enter_context(tempfile.TemporaryDirectory())}/agl.db"
        with serving(uri) as (process, url):
            fill(url, process.pid, arguments.spans)
        with closing(open_store(uri)) as store:
            names = add_group(store)
            took = [read(store, names) for _ in range(_READS)]
            listed = [list_first(store) for _ in range(_READS)]
    wall_ms, cpu_ms = (median(column) for column in zip(*took, strict=True))
    print(
        f"\n{_ROLLOUTS} rollouts of {_CALLS} calls as trajectories: {took[0][0]:.0f} ms the first time, in the median"
        f" of {_READS} {wall_ms:.0f} ms, {cpu_ms:.0f} ms of CPU."
        f"\nThe page's first list, {PAGE_ROLLOUTS} rollouts: {listed[0]:.0f} ms the first time, in the median"
        f" {median(listed):.0f} ms."
    )


if __name__ == "__main__":
    main()
