"""Simulates rollouts on many machines, calibrated on what `benchmarks.thousand` measured, and names the bottleneck.

    .venv/bin/python -m benchmarks.simulation [--figures FILE] [--plot docs/images/machines.svg]

A closed network of queues, as a discrete-event simulation (SimPy): a fixed number of rollouts is in flight. Each call
of a rollout uses a core of an agent's machine, then each kind of server for its CPU time per call, and one slot of an
engine for a delay; an ended rollout then uses the trainer, and the next one begins. All times are exponential.

First it predicts this machine, where all processes share the cores: calibrated on the measured run with the fewest
rollouts in flight, it predicts the others. Then it predicts 10, 100 and 1,000 machines of agents, with the servers of
the options, and says how many of each kind the agents of that many machines would need. Prints Markdown.
"""

import argparse
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import simpy

from benchmarks.thousand import FIGURES, Figures, read

MACHINES = (1, 3, 10, 30, 100, 300, 1000)
_SHOWN = (10, 100, 1000)
_AGENTS = "runner"
_NOT_SERVERS = (_AGENTS, "engine", "this benchmark")
"""The engine is the null engine, whose delay is simulated."""
DELAY = "delay"
"""A station with a server for each rollout: an engine that answers all calls at once."""
_BUSY = 0.7
"""Utilization for which servers are planned: a queue with random arrivals grows without bound towards 1."""
_SATURATED = 0.9
_CALLS = 40_000
"""Calls to simulate."""
_PASSES = 3
"""And at least so many of each rollout, so that queues have filled."""


@dataclass(frozen=True, slots=True)
class Station:
    """`servers` servers, one of which each call needs for `seconds` on average."""

    name: str
    servers: int
    seconds: float
    on_cores: bool = False
    """A server needs one of the network's shared cores while it works."""


@dataclass(frozen=True, slots=True)
class Network:
    """`rollouts` rollouts go through the stations `calls` times each, then once through the stations `at_end`."""

    rollouts: int
    calls: int
    stations: Sequence[Station]
    at_end: Sequence[Station] = ()
    cores: int | None = None
    """Cores that the stations `on_cores` share."""


@dataclass(frozen=True, slots=True)
class Outcome:
    rollouts_per_s: float
    busy: Mapping[str, float]
    """Utilization of each station."""

    @property
    def bottleneck(self) -> str:
        """The busiest station; if all have time, the number of rollouts in flight is what limits the rate."""
        name = max(self.busy, key=lambda name: self.busy[name])
        return name if self.busy[name] > _SATURATED else "rollouts in flight"


def bound(network: Network) -> float:
    """Most rollouts per second: min(N / sum of D, min over stations of m / D), D being the seconds per rollout.

    The asymptotic bounds of a closed network (Denning and Buzen, The Operational Analysis of Queueing Network Models,
    1978). A station with as many servers as rollouts is a delay.
    """
    demands = [(station.servers, station.seconds * network.calls) for station in network.stations]
    demands += [(station.servers, station.seconds) for station in network.at_end]
    limits = [servers / seconds for servers, seconds in demands if seconds]
    shared = sum(station.seconds * network.calls for station in network.stations if station.on_cores)
    if network.cores and shared:
        limits.append(network.cores / shared)
    return min(network.rollouts / sum(seconds for _, seconds in demands), *limits)


def simulate(network: Network, *, seed: int = 0, calls: int = _CALLS) -> Outcome:
    """Rates after a warm-up of a third of the time in which about `calls` calls are made."""
    environment, draw = simpy.Environment(), random.Random(seed)
    stations = [*network.stations, *network.at_end]
    resources = {station.name: simpy.Resource(environment, station.servers) for station in stations}
    cores = simpy.Resource(environment, network.cores) if network.cores else None
    until = calls / network.calls / bound(network)
    warm_up = until / 3
    ended, busy_s = 0, dict.fromkeys(resources, 0.0)

    def visit(station: Station) -> Iterable[Any]:
        with resources[station.name].request() as place:
            yield place
            if station.on_cores and cores is not None:
                with cores.request() as core:
                    yield core
                    yield from work(station)
            else:
                yield from work(station)

    def work(station: Station) -> Iterable[Any]:
        begin = environment.now
        yield environment.timeout(draw.expovariate(1 / station.seconds) if station.seconds else 0)
        busy_s[station.name] += max(0.0, environment.now - max(begin, warm_up))

    def rollout() -> Any:
        nonlocal ended
        # Not in step: each begins at a call of its own.
        made = draw.randrange(network.calls)
        while True:
            for _ in range(made, network.calls):
                for station in network.stations:
                    yield from visit(station)
            for station in network.at_end:
                yield from visit(station)
            made = 0
            ended += environment.now > warm_up

    for _ in range(network.rollouts):
        environment.process(rollout())
    environment.run(until)
    took = until - warm_up
    busy = {
        station.name: busy_s[station.name] / took / station.servers for station in stations if station.name != DELAY
    }
    if network.cores:
        shared_s = sum(busy_s[station.name] for station in stations if station.on_cores)
        busy["cores"] = shared_s / took / network.cores
    return Outcome(ended / took, busy)


def this_machine(measured: Figures, rollouts: int) -> Network:
    """All processes on the cores that other programs left; a process of ours uses one core at a time."""
    slower = measured.cores / (measured.cores - measured.cores_of_others)
    stations = [
        Station(name, measured.runners if name == _AGENTS else 1, cpu_ms / 1000 * slower, on_cores=True)
        for name, cpu_ms in measured.cpu_ms_per_call.items()
    ]
    delay = Station(DELAY, rollouts, measured.delay_s)
    return Network(rollouts, measured.calls_per_rollout, [*stations, delay], cores=measured.cores)


@dataclass(frozen=True, slots=True)
class Point:
    """Rollouts per second of so many machines, simulated and at most."""

    machines: int
    simulated: float
    bound: float


@dataclass(frozen=True, slots=True)
class Deployment:
    """Servers beside the machines of the agents."""

    servers: Mapping[str, int]
    """Processes by kind; the store's are cores."""
    engines: int
    slots: int
    """Calls that an engine answers at once."""
    trainers: int
    trainer_s: float
    """Seconds of a trainer per rollout."""


def many_machines(measured: Figures, machines: int, rollouts: int, deployed: Deployment) -> Network:
    """`rollouts` on each of `machines` machines with as many cores as this one."""
    stations = [Station("agents", machines * measured.cores, measured.cpu_ms_per_call[_AGENTS] / 1000)]
    for name, count in deployed.servers.items():
        stations.append(Station(name, count, measured.cpu_ms_per_call[name] / 1000))
    stations.append(Station("engine slots", deployed.engines * deployed.slots, measured.delay_s))
    trainer = Station("trainer", deployed.trainers, deployed.trainer_s)
    return Network(machines * rollouts, measured.calls_per_rollout, stations, [trainer])


def needed(network: Network, agents_per_s: float) -> dict[str, int]:
    """Servers of each kind that are at most _BUSY busy at the rate `agents_per_s` of rollouts that the agents reach."""
    per_rollout = {station.name: station.seconds * network.calls for station in network.stations}
    per_rollout |= {station.name: station.seconds for station in network.at_end}
    return {name: math.ceil(agents_per_s * seconds / _BUSY) for name, seconds in per_rollout.items()}


def show_this_machine(runs: Mapping[int, Figures]) -> None:
    (calibrated, measured), *others = runs.items()
    print(f"This machine, calibrated at {calibrated:,} rollouts in flight:\n")
    print(
        "| rollouts in flight | measured rollouts/s | predicted | difference | bottleneck |\n|---:|---:|---:|---:|---|"
    )
    for rollouts, run in [(calibrated, measured), *others]:
        network = this_machine(replace(measured, cores_of_others=run.cores_of_others), rollouts)
        outcome = simulate(network)
        difference = outcome.rollouts_per_s / run.rollouts_per_s - 1
        rates = f"{run.rollouts_per_s:.2f} | {outcome.rollouts_per_s:.2f} | {difference:+.0%}"
        print(f"| {rollouts:,} | {rates} | {outcome.bottleneck} |", flush=True)


def show_many_machines(measured: Figures, rollouts: int, deployed: Deployment) -> list[Point]:
    servers = ", ".join(f"{count} {name}" for name, count in deployed.servers.items())
    print(
        f"\n{rollouts} rollouts on each machine of {measured.cores} cores; {servers}, {deployed.engines} engines of "
        f"{deployed.slots} slots, {deployed.trainers} trainers of {1 / deployed.trainer_s:.0f} rollouts/s:\n"
    )
    print("| machines | rollouts/s | bound | bottleneck | for as many as the agents can do: servers of each kind |")
    print("|---:|---:|---:|---|---|")
    points: list[Point] = []
    for machines in MACHINES:
        network = many_machines(measured, machines, rollouts, deployed)
        outcome, limit = simulate(network, calls=max(_CALLS, _PASSES * network.rollouts)), bound(network)
        points.append(Point(machines, outcome.rollouts_per_s, limit))
        if machines in _SHOWN:
            wanted = needed(network, bound(replace(network, stations=_unlimited(network), at_end=())))
            cells = ", ".join(f"{count:,} {name}" for name, count in wanted.items() if name != "agents")
            rates = f"{outcome.rollouts_per_s:.1f} | {limit:.1f}"
            print(f"| {machines:,} | {rates} | {outcome.bottleneck} | {cells} |", flush=True)
    return points


def _unlimited(network: Network) -> list[Station]:
    """All stations but the agents as delays."""
    agents, *others = network.stations
    return [agents, *(replace(station, servers=network.rollouts) for station in others)]


def plot(points: Sequence[Point]) -> str:
    """SVG of both rates over the number of machines, on logarithmic scales."""
    width, height, left, bottom = 640, 360, 60, 40
    rates = [rate for point in points for rate in (point.simulated, point.bound)]
    low, high = math.floor(math.log10(min(rates))), math.ceil(math.log10(max(rates)))

    def at(machines: float, rate: float) -> str:
        x = left + (width - left - 20) * math.log10(machines) / math.log10(points[-1].machines)
        y = (height - bottom) - (height - bottom - 30) * (math.log10(rate) - low) / (high - low)
        return f"{x:.1f},{y:.1f}"

    def text(place: str, label: str, anchor: str = "middle") -> str:
        x, y = place.split(",")
        return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{label}</text>'

    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" ']
    lines[0] += 'font-size="12">'
    lines.append(f'<rect width="{width}" height="{height}" fill="white"/>')
    for power in range(low, high + 1):
        start, end = at(1, 10.0**power), at(points[-1].machines, 10.0**power)
        lines.append(f'<polyline points="{start} {end}" stroke="#ddd"/>')
        lines.append(text(f"{left - 8},{float(start.split(',')[1]) + 4:.1f}", f"{10.0**power:g}", "end"))
    for point in points:
        x = at(point.machines, 10.0**low).split(",")[0]
        lines.append(text(f"{x},{height - bottom + 16}", f"{point.machines:,}"))
    for rates, style in (("bound", 'stroke="#888" stroke-dasharray="5 4"'), ("simulated", 'stroke="#0b62a4"')):
        places = " ".join(at(point.machines, getattr(point, rates)) for point in points)
        lines.append(f'<polyline points="{places}" fill="none" stroke-width="2" {style}/>')
    lines.append(text(f"{width / 2},{height - 6}", "machines of agents"))
    lines.append(text(f"{left},16", "rollouts per second: simulated (solid), bound (dashed)", "start"))
    return "\n".join([*lines, "</svg>\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", type=Path, default=FIGURES)
    parser.add_argument("--rollouts", type=int, default=50, help="in flight on each machine")
    parser.add_argument("--servers", type=int, default=16, help="processes of each kind of server")
    parser.add_argument("--engines", type=int, default=16)
    parser.add_argument("--slots", type=int, default=256, help="calls that an engine answers at once")
    parser.add_argument("--trainers", type=int, default=32, help="devices of the trainer")
    parser.add_argument("--trainer-s", type=float, default=0.1, help="of one per rollout (RESULTS: 8 to 11 s for 96)")
    parser.add_argument("--plot", type=Path, help="SVG file to write")
    arguments = parser.parse_args()
    runs = read(arguments.figures)
    show_this_machine(runs)
    measured = list(runs.values())[-1]
    kinds = [name for name in measured.cpu_ms_per_call if name not in _NOT_SERVERS]
    servers: dict[str, int] = dict.fromkeys(kinds, int(arguments.servers))
    deployed = Deployment(servers, arguments.engines, arguments.slots, arguments.trainers, arguments.trainer_s)
    points = show_many_machines(measured, arguments.rollouts, deployed)
    if arguments.plot:
        arguments.plot.write_text(plot(points))


if __name__ == "__main__":
    main()
