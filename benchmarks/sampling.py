"""Simulate production through a sampled store, and compare what is left with what there was.

.venv/bin/python -m benchmarks.sampling                     # 20,000 rollouts through SQLite; prints a table
.venv/bin/python -m benchmarks.sampling --rollouts 2000

Two services, groups of one to three rollouts, rewards from 0 to 1, two samplers over one store that restart each minute
by turns. A second store with one sampler that never restarts has to decide the same.
"""

import argparse
import math
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Final

from agl import semconv
from agl.config import TrafficSamplingConfig
from agl.sampling import Sampler
from agl.span import Span
from agl.store import open_store
from agl.store.span_row import SpanRow
from agl.store.traffic import TrafficStore
from agl.trajectory import Decision, read_sampled

CONFIG: Final = TrafficSamplingConfig(base_rate=0.3, reward_threshold=0.7, max_span_per_minute=40, grace_s=0)
PER_MINUTE: Final = 100
_MINUTE_NS: Final = 60 * 10**9
_BASE_NS: Final = 25_000_000 * _MINUTE_NS


@dataclass(frozen=True, slots=True)
class Made:
    """A rollout as it was sent."""

    rollout_id: str
    group_id: str
    service: str
    minute: int
    reward: float
    calls: int

    @property
    def span_count(self) -> int:
        return self.calls + 2

    def spans(self) -> Iterator[Span]:
        """A root, its calls, and its reward."""
        number = int(self.rollout_id.rpartition("-")[2])
        named = {semconv.ROLLOUT_ID: self.rollout_id, semconv.GROUP_ID: self.group_id, semconv.MODE: "prod"}
        names = [semconv.SPAN_ROLLOUT, semconv.SPAN_REWARD, *(["chat m"] * self.calls)]
        start_ns = _BASE_NS + self.minute * _MINUTE_NS
        for place, name in enumerate(names):
            extra = {semconv.REWARD_VALUE: self.reward} if name == semconv.SPAN_REWARD else {}
            ids = (
                f"{number + 1:032x}",
                f"{number * 100 + place + 1:016x}",
                f"{number * 100 + 1:016x}" if place else None,
            )
            yield Span(
                *ids,
                name,
                start_ns + place,
                start_ns + place + 1,
                named | extra,
                resource={"service.name": self.service},
            )


def production(rollouts: int, seed: int = 0) -> list[Made]:
    """`rollouts` of them, minute after minute; rewards are higher in larger groups, and some rollouts are long."""
    draw, made = random.Random(seed), list[Made]()
    while len(made) < rollouts:
        first, service = len(made), draw.choice(["shop", "search"])
        for _ in range(draw.choice([1, 1, 2, 3])):
            reward, calls = round(draw.betavariate(2, 4), 3), draw.choice([1, 2, 3, 5])
            made.append(Made(f"r-{len(made)}", f"g-{first}", service, first // PER_MINUTE, reward, calls))
    return made


def run(made: Sequence[Made], stores: Sequence[TrafficStore], *, restarts: bool) -> dict[str, Decision | None]:
    """Send `made` to the first of `stores`, which share a database, with a sampler on each; returns the decisions."""
    samplers = [Sampler(store, CONFIG) for store in stores]
    by_minute: dict[int, list[Made]] = defaultdict(list)
    for one in made:
        by_minute[one.minute].append(one)
    for minute, some in sorted(by_minute.items()):
        now_ns = _BASE_NS + minute * _MINUTE_NS
        for part, second in ((0, 10), (1, 40)):
            rows = [SpanRow.of(span) for one in some if int(one.group_id[2:]) % 2 == part for span in one.spans()]
            stores[0].append_pending(rows, now_ns=now_ns + second * 10**9)
            # The samplers take turns: in the middle of a minute one sees what the other has not.
            samplers[minute % len(samplers)].run_once(now_ns + second * 10**9 - 1)
        if restarts:
            samplers[minute % len(samplers)] = Sampler(stores[minute % len(samplers)], CONFIG)
        for sampler in samplers:
            sampler.run_once(now_ns + _MINUTE_NS + 3 * 10**9)
    return {one.rollout_id: _decision(stores[0], one) for one in made}


def _decision(store: TrafficStore, made: Made) -> Decision | None:
    """The decision on a rollout; None if what is left of it does not fit it, or there is none."""
    spans = store.query_spans(made.rollout_id)
    sampled = read_sampled(spans)
    left = sum(span.name != semconv.SPAN_SAMPLED for span in spans)
    if sampled is None or sampled.spans != made.span_count:
        return None
    return sampled.decision if left == (made.span_count if sampled.decision.kept else 0) else None


@dataclass(frozen=True, slots=True)
class Figures:
    """What sampling did to the rollouts of a simulation."""

    mean: float
    """Of all rewards."""
    estimate: float
    """Of the kept ones by 1/p."""
    error: float
    """Standard error of the estimate."""
    unweighted: float
    kept: int
    rewarded_lost: int
    """Rollouts of at least the threshold that were left out."""
    groups_cut: int
    most_spans: int
    """By chance, of a service and minute."""
    undecided: int

    @classmethod
    def of(cls, made: Sequence[Made], decisions: dict[str, Decision | None]) -> "Figures":
        found = [(one, decision) for one in made if (decision := decisions[one.rollout_id])]
        kept = [(one, 1 / decision.probability) for one, decision in found if decision.kept]
        total = sum(weight for _, weight in kept)
        estimate = sum(weight * one.reward for one, weight in kept) / total
        spans: dict[tuple[str, int], int] = defaultdict(int)
        fates: dict[str, set[bool]] = defaultdict(set)
        deviations: dict[tuple[str, float], float] = defaultdict(float)
        for one, decision in found:
            fates[one.group_id].add(decision.kept)
            if decision.kept and decision.probability < 1:
                spans[one.service, one.minute] += one.span_count
        for one, weight in kept:
            deviations[one.group_id, weight] += one.reward - estimate
        variance = sum(weight * (weight - 1) * value**2 for (_, weight), value in deviations.items())
        return cls(
            mean=sum(one.reward for one in made) / len(made),
            estimate=estimate,
            error=math.sqrt(variance) / total,
            unweighted=sum(one.reward for one, _ in kept) / len(kept),
            kept=len(kept),
            rewarded_lost=sum(not d.kept for one, d in found if one.reward >= CONFIG.reward_threshold),
            groups_cut=sum(len(fate) > 1 for fate in fates.values()),
            most_spans=max(spans.values(), default=0),
            undecided=len(made) - len(found),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=20_000)
    made = production(parser.parse_args().rollouts)
    with tempfile.TemporaryDirectory() as folder:
        uris = [f"sqlite:///{folder}/{name}.db" for name in ("two", "two", "one")]
        stores = [store for uri in uris if isinstance(store := open_store(uri), TrafficStore)]
        with closing(stores[0]), closing(stores[1]), closing(stores[2]):
            since = time.monotonic()
            decisions = run(made, stores[:2], restarts=True)
            seconds = time.monotonic() - since
            same = decisions == run(made, stores[2:], restarts=False)
    print(f"{len(made)} rollouts in {seconds:.0f} s; one sampler decides the same: {same}")
    print(Figures.of(made, decisions))


if __name__ == "__main__":
    main()
