"""What rule, evidence and guards decide together, on rollouts whose values are known."""

from dataclasses import replace
from typing import Any

import pytest

from agl.canary.history import Canary, Share
from agl.canary.observation import Observed, Unproved, scaled
from agl.canary.table import Sample
from agl.canary.verdict import Verdict, judge_observed
from agl.config import CanaryConfig
from agl.errors import CanaryError

DAY_NS = 86_400 * 10**9
FIRST = 20_000


def canary(**settings: Any) -> Canary:
    return Canary(
        id="c",
        candidate={"planner": "planner@13"},
        current={"planner": "planner@12"},
        shares=[Share(since_ns=0, fraction=0.5)],
        settings=CanaryConfig.model_validate({"fraction": 0.5, "promote": {"min_rollouts": 20}} | settings),
    )


def samples(candidate: Any, current: Any, days: int = 4, a_day: int = 10, **same: Any) -> list[Sample]:
    """Pairs of rollouts, one of each arm, on days from 2024-10-04 on; `candidate` and `current` are fields."""
    found = []
    for number in range(days * a_day):
        for is_candidate, fields in ((False, current), (True, candidate)):
            day = f"2024-10-{4 + number // a_day:02d}"
            fixed = {"failed": False, "latency_s": 1.0, "reward": 0.5, "ended_ns": number, "rewarded_ns": number}
            found.append(Sample(f"r-{number}", "k", is_candidate, 0.5, day, **fixed | same | fields))
    return found


def verdict(found: list[Sample], on_day: int = 4, unproved: Any = (), **settings: Any) -> Verdict:
    return judge_observed(Observed(found, 0, list(unproved)), canary(**settings), (FIRST + on_day) * DAY_NS)


def test_a_promotion_needs_rule_evidence_and_enough_rollouts() -> None:
    better = samples({"reward": 0.9}, {})
    assert verdict(better).action == "promoted"
    assert verdict(better).wealth.better == pytest.approx((1.06**40 + 1.12**40 + 1.24**40) / 3)
    assert (
        "above 0.15: 1 (needed: 3)" in verdict(better, on_day=1).reason and verdict(better, on_day=1).action == "wait"
    )
    assert "rewarded rollouts: 40 (needed: 50)" in verdict(better, promote={}).reason
    few = verdict(samples({"reward": 0.6}, {}, a_day=7))
    assert few.action == "wait" and "still lacks evidence that it earns more: K" in few.reason


def test_a_candidate_that_earns_less_fails_more_or_is_slower_is_rolled_back() -> None:
    assert "earns less" in verdict(samples({"reward": 0.1}, {})).reason
    assert "fails more often" in verdict(samples({"failed": True, "reward": None}, {})).reason
    assert "p95 latency" in verdict(samples({"latency_s": 2.0}, {})).reason
    assert verdict(samples({"latency_s": 1.4}, {})).action == "wait"
    assert verdict(samples({"latency_s": 2.0}, {}, a_day=4)).wealth.slow == 1
    assert verdict(samples({"failed": True}, {"failed": True})).action == "wait"
    for fields in ({"reward": 0.1}, {"failed": True}, {"latency_s": 2.0}):
        assert verdict(samples(fields, {})).action == "rolled_back"


def test_what_is_slow_is_compared_with_the_past_only() -> None:
    """The same 20 pairs, but later rollouts of the current version are slower, or faster: K of the past stays."""
    early = samples({"latency_s": 2.0}, {}, days=3)
    known = verdict(early).wealth.slow
    # 20 of the current version come first, so the candidate's rollouts from the 20th on count: 11 of them.
    assert known == pytest.approx((1 / 3) * sum((1 + stake / 0.05 * 0.95) ** 11 for stake in (0.15, 0.3, 0.6)))
    for latency_s in (100.0, 0.1):
        later = [replace(s, latency_s=latency_s, ended_ns=10**6) for s in samples({}, {}) if not s.is_candidate]
        assert verdict([*early, *later]).wealth.slow == known


def test_a_version_that_is_not_proved_stops_before_all_else_and_the_call_is_named() -> None:
    found = verdict(samples({"reward": 0.9}, {}), unproved=[Unproved("r-7", "span-7", "planner@13", "base@0")])
    assert found.action == "stopped" and "call span-7 of rollout r-7 by base@0 in place of planner@13" in found.reason
    assert found.evidence()["unproved"][0]["span_id"] == "span-7"


def test_days_without_rewards_and_stores_without_any_are_said() -> None:
    assert "no production rollout has called planner" in verdict([]).notes[0]
    assert "none of 8 rollouts has a reward" in verdict(samples({}, {}, 4, 1, reward=None)).notes[0]
    gap = [s for s in samples({"reward": 0.9}, {}) if s.day != "2024-10-05"]
    assert verdict(gap).days_running == 2
    silent = [*gap, *(s for s in samples({"reward": None}, {}) if s.day == "2024-10-05")]
    assert verdict(silent).days_running == 2
    assert "the candidate has no reward on 2024-10-05" in verdict(silent).notes[0]
    assert "has no ratio" in verdict(samples({"reward": 0.9}, {"reward": 0.0})).notes[0]


def test_rewards_are_scaled_and_one_outside_names_its_rollout() -> None:
    wide = canary(lowest_reward=-1, highest_reward=3)
    assert scaled(0.0, "r", wide) == 0.25
    with pytest.raises(CanaryError, match=r"rollout r-9 has the reward 3.5, and the canary expects -1 to 3"):
        scaled(3.5, "r-9", wide)
