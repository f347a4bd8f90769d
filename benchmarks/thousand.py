"""A thousand LangGraph rollouts at once on one machine: what is lost, what the gateway adds, how memory grows.

    .venv/bin/python -m benchmarks.thousand [--minutes 10] [--rollouts 1000] [--calls 20] [--delay-s 1] [--several]

`agl serve` (gateway, collector and store server) is between the null engine and several `agl runner`. The runners hold
`--rollouts` rollouts in flight; each makes `--calls` model calls, whose delays at the engine are random with the mean
`--delay-s`. The time begins when all are in flight. After it no more are queued, and the benchmark waits until all have
ended. Then it reads every call from the store and compares it with what the engine answers.

With `--several`, two gateways and two collectors are behind one address each. The store is PostgreSQL, with Redis in
front of it. A gateway gets SIGKILL after a third of the time, a collector after half of it; each is started again. An
agent whose gateway dies sends its call again, so that a call may be in the store more than once, but never less.

Runners have a lower priority (`nice` 5), because agents do not run on a server's cores elsewhere. A probe makes ten
calls per second meanwhile. The gateway's own time is the time of such a call without that at the engine, which the
engine reports. Prints Markdown, adds the figures to the JSON file `--figures`, and exits with 1 if anything is lost or
wrong.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import count, pairwise
from pathlib import Path
from statistics import mean, median
from urllib.parse import urlsplit

from agl.runner.child import child_command
from agl.store import Attempt, AttemptState, Rollout, RolloutState, Store, open_store
from agl.trajectory import build_trajectory
from agl.trajectory.call import Call
from benchmarks.gateway import engine_command, running
from benchmarks.http_load import Client, request
from benchmarks.null_engine import prompt_ids, token_ids
from benchmarks.process import Memory, cpu_s, growth, machine_cpu_s, memory_mb
from benchmarks.thousand_agent import ROLES
from benchmarks.thousand_servers import AGL, Servers, one_server, several_servers
from tests.waiting import wait_until

FIGURES = Path(__file__).with_name("thousand.json")
_PROBES_PER_S = 10
_PROBE_DELAY_MS = 100
_FIRST_PROBE = 10**9
"""Number of its answer, beyond those of the rollouts: equal ids of responses would join their traces."""
_UNRESPONSIVE_S = 60
_START_S, _DRAIN_S = 300, 600
_LOOK_S = 0.25
KILLS = {"gateway 1": 1 / 3, "collector 1": 1 / 2}
"""Servers that are killed, and when: shares of the time."""
_LINES = 20
"""Faults that are shown, and last lines of the runners' log."""
_QUEUED, _ALL = 0.25, 0.9
"""Rollouts that wait in the queue, and those that run when all are said to be in flight, as shares of `--rollouts`."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of the servers."""

    rollouts: int
    calls: int
    delay_s: float
    runners: int
    seconds: float

    def rollout(self, number: int) -> Rollout:
        task = {"first": number * self.calls, "turns": self.calls, "mean_s": self.delay_s}
        return Rollout(f"r{number}", task, mode="train", unresponsive_s=_UNRESPONSIVE_S)


@dataclass(slots=True)
class Measured:
    """Taken between two marks: when all rollouts are in flight for the first time, and when no more are queued."""

    in_flight: list[int] = field(default_factory=list)
    own_ms: list[float] = field(default_factory=list)
    memory: dict[str, list[tuple[float, Memory]]] = field(default_factory=dict)
    marks: list[tuple[float, int, float, dict[str, float]]] = field(default_factory=list)
    """Time, ended rollouts, CPU seconds of the machine, and of each process."""


@contextmanager
def runners(folder: Path, servers: Servers, load: Load) -> Iterator[dict[str, "subprocess.Popen[bytes]"]]:
    """Processes of `agl runner`, which drain at the end."""
    config = folder / "runner.json"
    train = {"model": "tiny", "agent": "benchmarks.thousand_agent:run", "instrument": ["agl_langchain"]}
    config.write_text(json.dumps({"train": train | {"timeout_s": 1800}}))
    options = ["--any-run", "--store", servers.gateway, "--collector", servers.collector]
    options += ["--concurrency", str(load.rollouts // load.runners)]
    with (folder / "runners.log").open("ab") as log, ExitStack() as stack:
        started: dict[str, subprocess.Popen[bytes]] = {}
        for number in range(load.runners):
            command = ["nice", "-n", "5", str(AGL), "runner", str(config), *options]
            started[f"runner {number + 1}"] = subprocess.Popen(child_command(command), stdout=log, stderr=log)
            stack.callback(started[f"runner {number + 1}"].kill)
        yield started
        for process in started.values():
            process.terminate()
        for process in started.values():
            process.wait(60)


class Run:
    """Feeds the queue, probes the gateway and looks at the processes until every rollout has ended."""

    def __init__(
        self, load: Load, servers: Servers, others: Mapping[str, int], store: Store, kills: Mapping[str, float]
    ) -> None:
        self._load = load
        self._servers = servers
        self._others = others
        self._store = store
        self._kills = dict(kills)
        self.measured = Measured()
        self.enqueued = 0

    async def run(self) -> None:
        probes = asyncio.create_task(self._probe())
        begin, marks = time.monotonic(), self.measured.marks
        states = Counter[RolloutState]()
        while not marks or self._is_short(*marks[0][:2], states):
            states = await self._feed()
            self._look(states)
            self._kill()
            if not marks and time.monotonic() - begin > _START_S:
                raise SystemExit(f"after {_START_S} s {states} rollouts; expected {self._load.rollouts} that run")
            await asyncio.sleep(_LOOK_S)
        self._mark(await asyncio.to_thread(self._states))
        probes.cancel()
        end, states = time.monotonic(), Counter({RolloutState.RUNNING: 1})
        while (states[RolloutState.QUEUED] or states[RolloutState.RUNNING]) and time.monotonic() - end < _DRAIN_S:
            await asyncio.sleep(_LOOK_S)
            states = await asyncio.to_thread(self._states)

    def _is_short(self, begin: float, ended: int, states: Counter[RolloutState]) -> bool:
        """Whether the time is not over, or no rollout or no probe has ended in it."""
        nothing = states[RolloutState.SUCCEEDED] == ended or not self.measured.own_ms
        return nothing or bool(self._kills) or time.monotonic() - begin < self._load.seconds

    def _states(self) -> Counter[RolloutState]:
        return Counter(self._store.count_rollouts())

    async def _feed(self) -> Counter[RolloutState]:
        states = await asyncio.to_thread(self._states)
        wanted = self._load.rollouts - states[RolloutState.RUNNING] + int(self._load.rollouts * _QUEUED)
        if (missing := wanted - states[RolloutState.QUEUED]) > 0:
            new = [self._load.rollout(self.enqueued + number) for number in range(missing)]
            await asyncio.to_thread(self._store.enqueue_rollouts, new)
            self.enqueued += missing
        return states

    def _kill(self) -> None:
        """Kill and start again what is due; its memory is then measured anew."""
        for name, share in [*self._kills.items()]:
            marks = self.measured.marks
            if marks and time.monotonic() - marks[0][0] >= share * self._load.seconds:
                del self._kills[name]
                self._servers.processes[name].restart()  # Here: it would end with a thread of a pool.
                del self.measured.memory[name]

    def _look(self, states: Counter[RolloutState]) -> None:
        now, measured = time.monotonic(), self.measured
        for name, process in self._servers.processes.items():
            measured.memory.setdefault(name, []).append((now, memory_mb(process.running.pid)))
        in_flight = states[RolloutState.RUNNING]
        if not measured.marks and in_flight >= self._load.rollouts * _ALL:
            self._mark(states)
            measured.own_ms.clear()
        if measured.marks:
            measured.in_flight.append(in_flight)

    def _mark(self, states: Counter[RolloutState]) -> None:
        pids = {**self._others, **{name: one.running.pid for name, one in self._servers.processes.items()}}
        used = {name: cpu_s(pid) for name, pid in pids.items()}
        self.measured.marks.append((time.monotonic(), states[RolloutState.SUCCEEDED], machine_cpu_s(), used))

    async def _probe(self) -> None:
        address = urlsplit(self._servers.gateway)
        host, port = address.hostname, address.port
        assert host is not None and port is not None
        idle: list[Client] = []

        async def call(number: int) -> None:
            client = idle.pop() if idle else None
            if client is None or not client.is_open:
                loop = asyncio.get_running_loop()
                _, client = await loop.create_connection(Client, host, port)
            began = time.monotonic()
            try:
                answer = await client.call(request("/v1", number, _PROBE_DELAY_MS, stream=False))
            except ConnectionError:  # The gateway was killed.
                return
            took_ms = (time.monotonic() - began) * 1000
            self.measured.own_ms.append(took_ms - float(answer.partition(b"engine;dur=")[2].split(b"\r\n", 1)[0]))
            idle.append(client)

        async with asyncio.TaskGroup() as calls:
            for number in count(_FIRST_PROBE):
                calls.create_task(call(number))
                await asyncio.sleep(1 / _PROBES_PER_S)


def faults_of(rollout_id: str, load: Load, calls: Sequence[Call], *, exact: bool = True) -> list[str]:
    """What differs from the calls that the rollout has made; with `exact` they are those of one attempt, once each."""
    first = int(rollout_id[1:]) * load.calls
    expected = {
        f"chatcmpl-{first + turn}": (ROLES[turn % len(ROLES)], prompt_ids(first + turn), token_ids(first + turn))
        for turn in range(load.calls)
    }
    found = Counter(call.response_id for call in calls)
    wrong = [name for name in expected if not found[name] or (exact and found[name] > 1)]
    faults = [f"{name} is recorded {found[name]} times" for name in wrong]
    for call in calls:
        got = (call.role, call.prompt_ids, call.response_ids)
        if not exact and call.error is not None:
            continue  # The client left, because another server was killed, and sent the call again.
        if call.response_id not in expected:
            faults.append(f"{call.response_id} is no call of the rollout (error: {call.error})")
        elif got != expected[call.response_id]:
            faults.append(f"{call.response_id} has {got}, expected {expected[call.response_id]}")
        if exact and (call.chat_span_id is None or call.attempt_id != f"{rollout_id}-a1"):
            faults.append(f"{call.response_id}: span of the framework {call.chat_span_id}, attempt {call.attempt_id}")
    return faults


def held_twice(attempts: Sequence[Attempt]) -> list[str]:
    """Attempts that began before the one before them had ended, or succeeded after another."""
    faults = [
        f"{later.attempt_id} began while {earlier.attempt_id} ran"
        for earlier, later in pairwise(sorted(attempts, key=lambda attempt: attempt.number))
        if earlier.ended_ns is None or later.started_ns < earlier.ended_ns
    ]
    done = [attempt.attempt_id for attempt in attempts if attempt.state is AttemptState.SUCCEEDED]
    return faults + ([f"{' and '.join(done)} succeeded"] if len(done) > 1 else [])


def check(store: Store, load: Load, enqueued: int, *, exact: bool) -> tuple[Counter[str], list[str]]:
    """Compare every call in the store with the engine's answers; counts, and what is wrong."""
    counts: Counter[str] = Counter(rollouts=enqueued)
    faults: list[str] = []
    for begin in range(0, enqueued, 100):
        names = [f"r{number}" for number in range(begin, min(begin + 100, enqueued))]
        rollouts, spans = store.get_rollouts(names), store.query_spans_by_rollout(names)
        for name in names:
            state = rollouts[name].state
            counts[state] += 1
            if state is not RolloutState.SUCCEEDED:
                faults.append(f"{name} is {state}: {[attempt.error for attempt in store.query_attempts(name)]}")
                continue
            calls = build_trajectory(spans[name]).calls
            counts["spans"] += len(spans[name])
            counts["calls"] += len(calls)
            counts["again"] += rollouts[name].attempts - 1
            twice = held_twice(store.query_attempts(name)) if rollouts[name].attempts > 1 else []
            faults += [f"{name}: {fault}" for fault in [*twice, *faults_of(name, load, calls, exact=exact)]]
    return counts, faults


@dataclass(frozen=True, slots=True)
class Figures:
    """What `benchmarks.simulation` is calibrated on."""

    cores: int
    cores_of_others: float
    """Cores that other programs used meanwhile."""
    runners: int
    rollouts_in_flight: int
    calls_per_rollout: int
    delay_s: float
    calls_per_s: float
    rollouts_per_s: float
    own_p50_ms: float
    own_p99_ms: float
    cpu_ms_per_call: dict[str, float]
    """By kind of process."""
    memory_mb_per_minute: dict[str, float]
    """Growth of the memory that only the process has, in the second half."""


def figures(load: Load, measured: Measured) -> Figures:
    """Over the time in which all rollouts were in flight."""
    (begin, before, all_before, used_before), (end, after, all_after, used_after) = measured.marks
    rate, spent = (after - before) / (end - begin), defaultdict[str, float](float)
    calls = rate * load.calls * (end - begin)
    ours_s = sum(used_after.values()) - sum(used_before.values())
    for name in used_after:
        spent[name.rstrip(" 0123456789")] += (used_after[name] - used_before.get(name, 0)) * 1000 / calls
    own = sorted(measured.own_ms)
    return Figures(
        len(os.sched_getaffinity(0)),
        max(0.0, (all_after - all_before - ours_s) / (end - begin)),
        load.runners,
        round(mean(measured.in_flight)),
        load.calls,
        load.delay_s,
        rate * load.calls,
        rate,
        median(own),
        own[int(len(own) * 0.99)],
        dict(spent),
        {name: growth(taken).own for name, taken in measured.memory.items()},
    )


def write(path: Path, rollouts: int, found: Figures) -> None:
    """Put the figures into the file, beside those of other numbers of rollouts."""
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | {str(rollouts): asdict(found)}, indent=2) + "\n")


def read(path: Path) -> dict[int, Figures]:
    """By the number of rollouts that should be in flight, in order."""
    known = json.loads(path.read_text())
    return {int(rollouts): Figures(**known[rollouts]) for rollouts in sorted(known, key=int)}


def show(found: Figures, measured: Measured, counts: Counter[str]) -> None:
    print("| rollouts in flight | calls/s | rollouts/s | own time p50, ms | p99, ms | probes |")
    print("|---:|---:|---:|---:|---:|---:|")
    rates = f"{found.calls_per_s:,.0f} | {found.rollouts_per_s:.1f} | {found.own_p50_ms:.1f} | {found.own_p99_ms:.1f}"
    print(f"| {found.rollouts_in_flight:,} | {rates} | {len(measured.own_ms):,} |\n")
    print(f"Other programs used {found.cores_of_others:.2f} of {found.cores} cores.\n")
    print("| process | CPU ms per call | share of a core |\n|---|---:|---:|")
    for name, spent in found.cpu_ms_per_call.items():
        print(f"| {name} | {spent:.2f} | {spent * found.calls_per_s / 1000:.2f} |")
    print("\n| process | MB at the end | growth of its own per minute, second half |\n|---|---:|---:|")
    for name, taken in measured.memory.items():
        print(f"| {name} | {taken[-1][1].whole:.0f} | {found.memory_mb_per_minute[name]:+.2f} |")
    print(
        f"\n{counts['rollouts']:,} rollouts, {counts[RolloutState.SUCCEEDED]:,} succeeded; {counts['calls']:,} calls, "
    )
    print(f"{counts['spans']:,} spans.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--rollouts", type=int, default=1000, help="in flight at once")
    parser.add_argument("--calls", type=int, default=20, help="of each rollout")
    parser.add_argument("--delay-s", type=float, default=1, help="mean delay of the engine")
    parser.add_argument("--runners", type=int, default=4, help="processes")
    parser.add_argument(
        "--several", action="store_true", help="two gateways and two collectors, of which one is killed"
    )
    parser.add_argument("--figures", type=Path, default=FIGURES)
    parser.add_argument("--folder", help="parent of the folder of store and logs, which is deleted at the end")
    arguments = parser.parse_args()
    load = Load(arguments.rollouts, arguments.calls, arguments.delay_s, arguments.runners, 60 * arguments.minutes)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder, ExitStack() as stack:
        url, command = engine_command()
        engine = stack.enter_context(running(child_command(command), f"{url}/models"))
        start = several_servers if arguments.several else one_server
        servers = stack.enter_context(start(Path(folder), url))
        store = stack.enter_context(closing(open_store(servers.gateway)))
        with runners(Path(folder), servers, load) as agents:
            others = {"engine": engine.pid, "this benchmark": os.getpid()}
            others |= {name: process.pid for name, process in agents.items()}
            run = Run(load, servers, others, store, KILLS if arguments.several else {})
            asyncio.run(run.run())
        wait_until(lambda: not servers.queued(), _DRAIN_S)
        counts, faults = check(store, load, run.enqueued, exact=not arguments.several)
        log = (Path(folder) / "runners.log").read_text().splitlines()
    found = figures(load, run.measured)
    show(found, run.measured, counts)
    for fault in faults[:_LINES]:
        print(f"FAULT {fault}")
    print("\n".join(log[-_LINES:] if faults else []))
    if not faults and not arguments.several:
        write(arguments.figures, load.rollouts, found)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
