"""The days of a canary: means, intervals, quantiles and the plain rule."""

import pytest

from agl.canary.table import Sample, by_day, days_running, improvement_ratio, quantile


def sample(
    arm: str, reward: float | None, day: str = "2026-11-29", latency_s: float = 1.0, failed: bool = False
) -> Sample:
    return Sample("r", "key", arm == "candidate", 0.5, day, 0, latency_s, failed, reward)


def test_a_day_has_both_arms_and_their_ratio_in_the_scale_of_the_rewards() -> None:
    rewards = [("current", 0.5), ("current", 0.6), ("candidate", 0.75), ("candidate", None)]
    (day,) = by_day([sample(arm, reward) for arm, reward in rewards], (-2, 2))
    assert (day.current.rollouts, day.current.rewards, day.candidate.rollouts, day.candidate.rewards) == (2, 2, 2, 1)
    assert day.current.mean == pytest.approx(0.2)
    assert day.current.interval == pytest.approx(1.96 * 0.2)
    assert (day.candidate.mean, day.candidate.interval) == (1.0, None)
    assert day.ratio == pytest.approx((1 - 0.2) / 0.2)


def test_errors_and_latencies_count_every_rollout() -> None:
    slow = [sample("candidate", None, latency_s=float(second), failed=second > 18) for second in range(1, 21)]
    (day,) = by_day(slow, (0, 1))
    assert (day.candidate.errors, day.candidate.p50_s, day.candidate.p95_s) == (2, 10, 19)
    assert (day.current.rollouts, day.current.p50_s, day.ratio) == (0, None, None)


def test_days_are_in_order_of_their_dates() -> None:
    days = by_day([sample("current", 1, "2026-12-01"), sample("current", 0, "2026-11-30")], (0, 1))
    assert [(day.date, day.current.mean) for day in days] == [("2026-11-30", 0), ("2026-12-01", 1)]


def test_the_ratio_is_of_the_size_of_the_current_mean() -> None:
    assert improvement_ratio(0.5, 0.6) == pytest.approx(0.2)
    assert improvement_ratio(-0.5, -0.4) == pytest.approx(0.2)
    assert improvement_ratio(0.0, 0.4) is None
    assert improvement_ratio(None, 0.4) is None


def test_the_rule_counts_days_running() -> None:
    assert days_running([0.2, 0.1, 0.2, 0.3], 0.15) == 2
    assert days_running([0.2, 0.2, None], 0.15) == 0
    assert days_running([0.15], 0.15) == 0
    assert days_running([], 0.15) == 0


def test_quantiles_are_values_that_were_measured() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2
    assert quantile([1.0, 2.0], 0.95) == 2
    assert quantile([], 0.5) is None
