"""Simulate canaries and count right and wrong decisions: by the e-process, by the plain rule, and by both.

.venv/bin/python -m benchmarks.canary            # 400 runs for each cell, prints a table, in 2 minutes
.venv/bin/python -m benchmarks.canary --runs 50

A rollout earns 1 with the probability of its arm, else 0, which is the greatest variance that rewards in [0, 1] can
have. The current version earns 0.5 on average. Each rollout is the candidate's with probability 0.1.
"""

import argparse
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from agl.canary.evidence import Outcome, differences, wealth
from agl.canary.table import days_running, improvement_ratio
from agl.seeds import derive

DAYS = 14
MEAN = 0.5
FRACTION, ALPHA = 0.1, 0.05
RATIO, RUNNING = 0.15, 3
"""The plain rule: a ratio greater than this on so many days running."""
EFFECTS = (0.0, 0.15, -0.15, 0.30)
PER_DAY = (300, 2000)


@dataclass(frozen=True, slots=True)
class Run:
    """The day, counted from 1, on which each condition was first met; None if it was not."""

    promoting: int | None
    """By the e-process."""
    rolling_back: int | None
    """By its mirror."""
    rule: int | None

    @property
    def both(self) -> int | None:
        return max(self.promoting, self.rule) if self.promoting and self.rule else None


def simulate(seed: int, effect: float, per_day: int) -> Run:
    """One canary of DAYS days whose candidate earns `effect` more, as a share of what the current version earns."""
    draws = random.Random(seed).random
    means = (MEAN, MEAN * (1 + effect))
    days: list[list[Outcome]] = []
    for _ in range(DAYS):
        arms = [draws() < FRACTION for _ in range(per_day)]
        days.append([Outcome(arm, float(draws() < means[arm]), FRACTION) for arm in arms])
    ratios = [
        improvement_ratio(*(fmean(o.value for o in day if o.is_candidate == arm) for arm in (0, 1))) for day in days
    ]
    return Run(
        promoting=_first_day(days, 1),
        rolling_back=_first_day(days, -1),
        rule=next((day for day in range(1, DAYS + 1) if days_running(ratios[:day], RATIO) >= RUNNING), None),
    )


def _first_day(days: Sequence[Sequence[Outcome]], sign: int) -> int | None:
    """Day on which the e-process for differences of this sign reaches 1 / ALPHA."""
    day = 0

    def outcomes() -> Iterator[Outcome]:
        nonlocal day
        for day, of_day in enumerate(days, start=1):  # noqa: B007 - read below
            yield from of_day

    reached = any(held >= 1 / ALPHA for held in wealth(sign * gain for gain in differences(outcomes())))
    return day if reached else None


def main() -> None:
    parser = argparse.ArgumentParser(description="Simulate canaries and count their decisions.")
    parser.add_argument("--runs", type=int, default=400)
    runs = parser.parse_args().runs
    print("| rollouts a day | candidate | promoted: e-process | plain rule | both | rolled back: e-process |")
    print("|---:|---:|---:|---:|---:|---:|")
    for per_day in PER_DAY:
        for effect in EFFECTS:
            found = [simulate(derive(0, "canary", per_day, run), effect, per_day) for run in range(runs)]
            columns = [[getattr(run, name) for run in found] for name in ("promoting", "rule", "both", "rolling_back")]
            cells = " | ".join(_cell(days) for days in columns)
            print(f"| {per_day:,} | {effect:+.0%} | {cells} |".replace("+0%", "equal").replace("%", " %"), flush=True)


def _cell(days: Sequence[int | None]) -> str:
    """Share of the runs in which a condition was met, and the median day of those."""
    reached = [day for day in days if day]
    return f"{len(reached) / len(days):.1%}" + (f", day {median(reached):g}" if reached else "")


if __name__ == "__main__":
    main()
