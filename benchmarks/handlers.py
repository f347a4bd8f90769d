"""CPU time that an instrumentation adds per run and per span, ours and the peers'. Prints Markdown.

.venv/bin/python -m benchmarks.handlers
.venv/bin/python -m benchmarks.handlers --framework autogen --rounds 3

Each instrumentation runs in a separate process, and all take turns in every round, so that other work on the machine
slows all alike. The processes are restarted every few rounds, because two processes of the same program differ by up to
a millisecond per run through their memory layout. The added cost is the difference to the base of the same round; the
table has medians over rounds. CPU time is that of the whole process until its spans are exported to a no-op exporter.
"""

import argparse
import gc
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from statistics import median
from subprocess import CalledProcessError

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from benchmarks.instrumentations import AUTOGEN_ITSELF, BARE_SPANS, COMPARED, NONE, Instrumentation
from benchmarks.workloads import Workload, workloads

MEASURED: dict[str, Sequence[Instrumentation]] = {
    "langchain": (NONE, BARE_SPANS, *COMPARED["langchain"]),
    "autogen": (AUTOGEN_ITSELF, *COMPARED["autogen"]),
}
"""Instrumentations by framework. The first is the base of the differences."""
ROUNDS_OF_A_PROCESS = 4
TARGET = 1 / 3
"""Highest acceptable ratio of our CPU time per span to that of the cheapest peer."""
TITLES = {
    "langchain": "LangChain: `create_agent`, 5 model calls, 4 tool calls",
    "autogen": "AutoGen: planner and executor, 6 model calls, 4 tool calls",
}


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of one instrumentation. All values are per run of the agent."""

    cpu_us: float
    wall_us: float
    spans: float


@dataclass(frozen=True, slots=True)
class Added:
    """CPU time and spans that an instrumentation adds to a run."""

    cpu_us: float
    spans: float

    @property
    def per_span(self) -> float:
        return self.cpu_us / self.spans


class Counting(SpanExporter):
    """Counts the spans and discards them."""

    def __init__(self) -> None:
        self.spans = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.spans += len(spans)
        return SpanExportResult.SUCCESS


class Worker:
    """A process with one instrumentation enabled. Raises CalledProcessError if it cannot be installed."""

    def __init__(self, framework: str, instrumentation: Instrumentation) -> None:
        self.instrumentation = instrumentation
        self._process = instrumentation.child("benchmarks.handlers", "--measure", framework, instrumentation.name)
        self.versions: list[str] = self._read()

    def turn(self, workload: str, runs: int) -> Turn:
        assert self._process.stdin
        self._process.stdin.write(json.dumps([workload, runs]) + "\n")
        self._process.stdin.flush()
        return Turn(**self._read())

    def close(self) -> None:
        self._process.communicate()

    def _read(self) -> object:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of {self.instrumentation.name} ended early; see its standard error")
        return json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=list(MEASURED), action="append")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--runs", type=int, default=3, help="runs of an agent per turn")
    parser.add_argument("--measure", nargs=2, metavar=("FRAMEWORK", "NAME"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*arguments.measure)
        return
    for framework in arguments.framework or list(MEASURED):
        print(compare(framework, arguments.rounds, arguments.runs), flush=True)


def measure(framework: str, name: str) -> None:
    """Main function of a worker's process: reads lines `[workload, runs]` and prints a turn for each, all as JSON."""
    instrumentation = next(one for one in MEASURED[framework] if one.name == name)
    exporter, provider = Counting(), TracerProvider()
    if not instrumentation.brings_processor:
        provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    switched = instrumentation.switch_on(provider, exporter)
    ways = {way.name: way for way in workloads(framework, switched.callbacks)}
    for way in ways.values():  # Warm up: one-time work is not part of the cost of a run.
        for _ in range(10 if way.agents == 1 else 1):
            way.run()
    gc.freeze()
    answers = sys.stdout
    print(json.dumps(instrumentation.versions()), file=answers, flush=True)
    for line in sys.stdin:
        workload, runs = json.loads(line)
        print(json.dumps(asdict(_turn(ways[workload], runs, provider, exporter))), file=answers, flush=True)


def _turn(way: Workload, runs: int, provider: TracerProvider, exporter: Counting) -> Turn:
    provider.force_flush()
    gc.collect()
    spans, cpu, wall = exporter.spans, time.process_time(), time.perf_counter()
    for _ in range(runs):
        way.run()
    elapsed = time.perf_counter() - wall
    provider.force_flush()
    per_run, agents = 1e6 / (runs * way.agents), runs * way.agents
    return Turn((time.process_time() - cpu) * per_run, elapsed * per_run, (exporter.spans - spans) / agents)


def compare(framework: str, rounds: int, runs: int) -> str:
    """Measure all instrumentations of one framework and return their tables."""
    ways = workloads(framework, [])
    turns: dict[tuple[str, str], list[Turn]] = {}
    workers: list[Worker] = []
    for number in range(rounds):
        print(f"{framework}: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        if number % ROUNDS_OF_A_PROCESS == 0:
            _close(workers)
            workers = [worker for one in MEASURED[framework] if (worker := _start(framework, one))]
        for way in ways:
            first = number % len(workers)  # Rotated, so that the order is different in each round.
            for worker in workers[first:] + workers[:first]:
                turn = worker.turn(way.name, runs if way.agents == 1 else 1)
                turns.setdefault((way.name, worker.instrumentation.name), []).append(turn)
    _close(workers)
    lines = [f"### {TITLES[framework]}", "", _conditions(framework, workers, rounds, runs), ""]
    for way in ways:
        lines += _table(
            way.name, [(worker.instrumentation, turns[way.name, worker.instrumentation.name]) for worker in workers]
        )
    return "\n".join(lines)


def _close(workers: Sequence[Worker]) -> None:
    for worker in workers:
        worker.close()


def _start(framework: str, instrumentation: Instrumentation) -> Worker | None:
    try:
        return Worker(framework, instrumentation)
    except CalledProcessError:
        print(f"{instrumentation.name} is left out: pip could not install it\n")
        return None


def _conditions(framework: str, workers: Sequence[Worker], rounds: int, runs: int) -> str:
    frameworks = {"langchain": ("langchain", "langchain-core", "langgraph"), "autogen": ("autogen-agentchat", "openai")}
    named = [f"{package} {version(package)}" for package in (*frameworks[framework], "opentelemetry-sdk")]
    versions = [*named, *(text for worker in workers for text in worker.versions)]
    return f"Medians over {rounds} rounds of {runs} runs. Python {platform.python_version()}, {', '.join(versions)}."


def _table(way: str, rows: Sequence[tuple[Instrumentation, list[Turn]]]) -> list[str]:
    base = rows[0][1]
    lines = [
        f"| {way} | CPU us per run | ratio | added CPU us per run | spans added | added CPU us per span | wall ratio |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    ours: list[Added] = []
    peers: list[Added] = []
    for instrumentation, turns in rows:
        cpu = f"| {instrumentation.name} | {median(turn.cpu_us for turn in turns):,.0f} |"
        if turns is base:
            lines.append(f"{cpu} 1.00 | | | | 1.00 |")
            continue
        pairs = list(zip(turns, base, strict=True))
        added, spans = (median(getattr(a, name) - getattr(b, name) for a, b in pairs) for name in ("cpu_us", "spans"))
        ratio, wall = (median(getattr(a, name) / getattr(b, name) for a, b in pairs) for name in ("cpu_us", "wall_us"))
        lines.append(f"{cpu} {ratio:.2f} | {added:,.0f} | {spans:.0f} | {added / spans:,.0f} | {wall:.2f} |")
        if instrumentation.is_ours:
            ours.append(Added(added, spans))
        elif instrumentation.packages:
            peers.append(Added(added, spans))
    return [*lines, "", _verdict(ours, peers), ""]


def _verdict(ours: Sequence[Added], peers: Sequence[Added]) -> str:
    if not ours or not peers:
        return "No peer to compare with."
    per_span = min(one.per_span for one in ours) / min(one.per_span for one in peers)
    per_run = min(one.cpu_us for one in ours) / min(one.cpu_us for one in peers)
    met = "met" if per_span <= TARGET else "missed"
    return (
        f"Ours takes {per_span:.2f} of the cheapest peer's CPU time per span and {per_run:.2f} per run. The target, at "
        f"most {TARGET:.2f} per span, is {met}."
    )


if __name__ == "__main__":
    main()
