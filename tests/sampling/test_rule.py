"""The rule of sampling: worked numbers, and 20,000 simulated rollouts."""

import math
import random
from collections import Counter, defaultdict
from dataclasses import dataclass

import pytest

from agl.config.sampling import TrafficSamplingConfig
from agl.sampling import Unit, decide, decide_in_window, window_threshold
from agl.sampling.rule import threshold_of
from agl.trajectory import Decision
from agl.trajectory import SamplingReason as Reason
from agl.trajectory.sampled import SPACE, randomness

LIMIT = 200
CONFIG = TrafficSamplingConfig(max_span_per_minute=LIMIT)


@dataclass(frozen=True)
class Simulated:
    """A rollout of the simulation; `unit` is its group or itself."""

    unit: str
    minute: int
    reward: float
    spans: int


def simulate(count: int, seed: int) -> list[Simulated]:
    """Rollouts with 1 to 9 spans, every third in a group of four; the longer ones earn less."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        spans = draw.randint(1, 9)
        grouped = number // 4 % 3 == 0
        reward = min(1.0, max(0.0, draw.gauss(0.6 - 0.04 * spans, 0.2)))
        found.append(Simulated(f"g{number // 4}" if grouped else f"r{number}", number // 200, reward, spans))
    return found


def units_of(rollouts: list[Simulated]) -> list[Unit]:
    members: dict[str, list[Simulated]] = defaultdict(list)
    for rollout in rollouts:
        members[rollout.unit].append(rollout)
    return [
        Unit(name, "shop", some[0].minute, sum(r.spans for r in some), max(r.reward for r in some))
        for name, some in members.items()
    ]


def decide_all(units: list[Unit], config: TrafficSamplingConfig = CONFIG) -> dict[str, Decision]:
    """The decision on each unit, all of a minute in one window."""
    alone = {unit.name: decide(unit, config) for unit in units}
    windows: dict[tuple[str, int], list[Unit]] = defaultdict(list)
    for unit in units:
        if alone[unit.name] is None:
            windows[unit.service, unit.minute].append(unit)
    thresholds = {window: window_threshold(some, config) for window, some in windows.items()}
    return {
        unit.name: alone[unit.name] or decide_in_window(unit, thresholds[unit.service, unit.minute]) for unit in units
    }


def test_randomness_is_the_start_of_the_sha256_of_the_id_and_the_trace_state_has_it_with_the_threshold() -> None:
    # printf task-7 | sha256sum
    assert randomness("task-7") == 0x014E4CEAA5A9E5
    # 0.7 * 2^56, of which a float has 53 bits. `th` has no trailing zeros, `rv` has 14 digits; 0 is certain.
    kept = decide_in_window(Unit("task-8", "shop", 0, 5), threshold_of(0.3))
    assert kept.kept and kept.trace_state() == "ot=th:b333333333333;rv:f0470f4ad3dcb9"
    assert Decision("task-7", False, Reason.BASE_RATE, threshold_of(0.5)).trace_state() == "ot=th:8;rv:014e4ceaa5a9e5"
    certain = Decision("task-7", True, Reason.REWARD, 0)
    assert certain.trace_state() == "ot=th:0;rv:014e4ceaa5a9e5"
    # A later stage only raises the threshold; what others have written stays.
    assert certain.trace_state("a=1, ot=th:c;p:8 ,b=2") == "ot=th:c;p:8;rv:014e4ceaa5a9e5,a=1,b=2"


@pytest.mark.parametrize(
    ("unit", "config", "expected"),
    [
        (Unit("task-3", "shop", 0, 5, 0.7), {}, (True, Reason.REWARD, 1.0)),
        (Unit("task-3", "shop", 0, 5, has_failed=True), {}, (True, Reason.FAILED, 1.0)),
        (Unit("task-3", "shop", 0, 5, has_failed=True), {"keep_failed": False}, (False, Reason.BASE_RATE, 0.3)),
        (Unit("task-3", "shop", 0, 5, mode="eval"), {"base_rate": 0}, (True, Reason.MODE, 1.0)),
        (Unit("task-3", "shop", 0, 5), {"base_rate": 0}, (False, Reason.BASE_RATE, 0.0)),
        (Unit("task-8", "shop", 0, 5), {"max_span_per_minute": None}, (True, Reason.BASE_RATE, 0.3)),
        (Unit("task-8", "shop", 0, 51), {}, (False, Reason.TOO_LONG, 0.0)),
        (Unit("task-8", "shop", 0, 50), {}, None),
    ],
)
def test_what_a_unit_alone_decides(
    unit: Unit, config: dict[str, object], expected: tuple[bool, Reason, float] | None
) -> None:
    found = decide(unit, TrafficSamplingConfig.model_validate(config))
    assert (found and (found.kept, found.reason, pytest.approx(found.probability))) == expected


def test_a_window_takes_the_largest_randomness_within_its_limit_and_the_next_one_is_the_threshold() -> None:
    units = [Unit(f"task-{number}", "shop", 0, 20) for number in range(8)]
    ordered = sorted(units, key=lambda unit: unit.randomness, reverse=True)
    config = TrafficSamplingConfig(base_rate=1, max_span_per_minute=50)
    threshold = window_threshold(units, config)
    assert threshold == ordered[2].randomness + 1
    assert [decide_in_window(unit, threshold).kept for unit in ordered] == [True, True] + [False] * 6
    assert decide_in_window(ordered[0], threshold).probability == 1 - threshold / SPACE
    assert window_threshold(units[:2], config) == 0


def test_simulated_rollouts_are_kept_whole_within_the_limit_and_give_the_true_mean() -> None:
    rollouts = simulate(20_000, seed=1)
    decisions = decide_all(units_of(rollouts))
    kept = [rollout for rollout in rollouts if decisions[rollout.unit].kept]
    assert 0 < len(kept) < len(rollouts)
    assert {r.unit for r in rollouts if r.reward >= CONFIG.reward_threshold} <= {r.unit for r in kept}

    by_chance = Counter[int]()
    for rollout in kept:
        if decisions[rollout.unit].reason is Reason.BASE_RATE:
            by_chance[rollout.minute] += rollout.spans
    # A group has the minute of its first rollout.
    assert max(by_chance.values()) <= LIMIT + 9 * 3
    assert decisions == decide_all(units_of(rollouts)[::-1])


@pytest.mark.parametrize("limit", [None, 60])
def test_the_weighted_mean_of_what_is_kept_is_the_mean_of_all(limit: int | None) -> None:
    """In the ratio form, with the variance of a ratio estimator; unweighted it is far off."""
    config = TrafficSamplingConfig(max_span_per_minute=limit)
    rollouts = simulate(20_000, seed=2)
    decisions = decide_all(units_of(rollouts), config)
    true_mean = sum(r.reward for r in rollouts) / len(rollouts)
    weighted = [(1 / decisions[r.unit].probability, r.reward) for r in rollouts if decisions[r.unit].kept]
    total = sum(weight for weight, _ in weighted)
    mean = sum(weight * reward for weight, reward in weighted) / total
    error = math.sqrt(sum(weight**2 * (reward - mean) ** 2 for weight, reward in weighted)) / total
    assert abs(mean - true_mean) < 4 * error
    assert abs(sum(reward for _, reward in weighted) / len(weighted) - true_mean) > 8 * error
