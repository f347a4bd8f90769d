"""Advantages in worked numbers, against TRL's values, and against what defines them."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agl.errors import TrainingError
from agl_trainer.algo.advantages import ADVANTAGES, estimate_advantages, group_advantages, max_at_k, next_baseline

TRL: dict[str, Any] = json.loads(Path(__file__).with_name("trl_losses.json").read_text(encoding="utf-8"))
SUMMED = [case for case in TRL["advantage_cases"] if case["multi_objective_aggregation"] == "sum_then_normalize"]

VALUES = torch.tensor([1.0, 0.0, 5.0, 5.0, 2.0], dtype=torch.float64)
GROUPS = ["a", "a", "b", "b", "c"]
"""Two that differ, two that do not, and one alone; a group need not stand together."""
ORDER = [0, 2, 4, 3, 1]

STD = math.sqrt(0.5) + 1e-4
# The sum of squares around the mean of 2.6 is 21.2; a quarter of it is the variance.
BATCH = math.sqrt(21.2 / 4) + 1e-4
# 0.5, -0.5 and three zeros have the squares' sum 0.5.
CENTRED = math.sqrt(0.5 / 4) + 1e-4

# grpo gives 0.5 / STD twice, whose squares' sum is divided by 4.
SCALED = math.sqrt(2 * (0.5 / STD) ** 2 / 4) + 1e-4


def advantages(name: str, **options: Any) -> list[float]:
    """Of VALUES, whose groups are given mixed."""
    found = group_advantages(name, VALUES[ORDER], [GROUPS[place] for place in ORDER], **options)
    back = torch.empty_like(found)
    back[torch.tensor(ORDER)] = found
    return back.tolist()


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("grpo", {}, [0.5 / STD, -0.5 / STD, 0, 0, 0]),
        ("grpo", {"scale_rewards": "batch"}, [0.5 / BATCH, -0.5 / BATCH, 0, 0, 0]),
        ("grpo", {"scale_rewards": "none"}, [0.5, -0.5, 0, 0, 0]),
        ("dr_grpo", {}, [0.5, -0.5, 0, 0, 0]),
        ("rloo", {}, [1.0, -1.0, 0, 0, 0]),
        ("reinforce++", {}, [(value - 2.6) / BATCH for value in (1, 0, 5, 5, 2)]),
        ("reinforce++_baseline", {}, [0.5 / CENTRED, -0.5 / CENTRED, 0, 0, 0]),
        ("gdpo", {}, [0.5 / STD / SCALED, -0.5 / STD / SCALED, 0, 0, 0]),
        ("max@k", {"k": 2}, [2.0, 0, 0, 0, 0]),
        ("ema", {"baseline": 2.0}, [-1.0, -2.0, 3.0, 3.0, 0.0]),
    ],
)
def test_each_by_hand(name: str, options: dict[str, Any], expected: list[float]) -> None:
    assert advantages(name, **options) == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("case", SUMMED, ids=lambda case: f"{case['scale_rewards']}-{case['reward_weights']}")
def test_grpo_is_that_of_trl_also_where_rewards_are_missing(case: dict[str, Any]) -> None:
    parts = [[math.nan if part is None else part for part in row] for row in TRL["rewards"]]
    values = torch.tensor(parts, dtype=torch.float64)
    rewards = (values * torch.tensor(case["reward_weights"] or [1.0, 1.0])).nansum(1)
    rewards[values.isnan().all(1)] = math.nan
    found = group_advantages("grpo", rewards, list("aaabbb"), scale_rewards=case["scale_rewards"])
    assert found.tolist() == pytest.approx(case["advantages"], abs=1e-6)


BY_DIMENSION = [case for case in TRL["advantage_cases"] if case["multi_objective_aggregation"] == "normalize_then_sum"]


@pytest.mark.parametrize("case", BY_DIMENSION, ids=lambda case: str(case["reward_weights"]))
def test_gdpo_is_that_of_trl_also_where_dimensions_are_missing(case: dict[str, Any]) -> None:
    rewards = [[math.nan if part is None else part for part in row] for row in TRL["rewards"]]
    found = group_advantages("gdpo", rewards, list("aaabbb"), weights=case["reward_weights"])
    assert found.tolist() == pytest.approx(case["advantages"], abs=1e-6)


def test_gdpo_refuses_weights_that_do_not_fit() -> None:
    with pytest.raises(TrainingError, match="1 weights, expected one for each of 2 dimensions"):
        group_advantages("gdpo", [[1.0, 0.0]], ["a"], weights=[1.0])


@pytest.mark.parametrize("k", [2, 3, 5, 6])
def test_max_at_k_is_the_mean_over_all_subsets(k: int) -> None:
    rewards = torch.tensor([0.3, 1.0, -0.5, 0.3, 2.0, 0.0], dtype=torch.float64)
    expected = [0.0] * 6
    for chosen in itertools.combinations(range(6), k):
        for place in chosen:
            others = max(rewards[other].item() for other in chosen if other != place)
            gain = max(rewards[list(chosen)].tolist()) - others
            expected[place] += gain * 6 / math.comb(6, k)
    assert max_at_k(rewards, k).tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_max_at_k_follows_the_gradient_of_the_best_of_k() -> None:
    """Its mean over all samples of a three-armed bandit is the gradient of the expected best of two, exactly."""
    logits = torch.tensor([0.2, -0.4, 0.1], dtype=torch.float64, requires_grad=True)
    arms = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
    odds = logits.softmax(0)
    best = sum(odds[i] * odds[j] * torch.maximum(arms[i], arms[j]) for i in range(3) for j in range(3))
    (expected,) = torch.autograd.grad(torch.as_tensor(best), logits)
    found = torch.zeros_like(logits)
    for draw in itertools.product(range(3), repeat=4):
        likelihood = logits.softmax(0)[list(draw)].detach().prod()
        score = (logits.log_softmax(0)[list(draw)] * max_at_k(arms[list(draw)], 2)).mean()
        found += likelihood * torch.autograd.grad(score, logits)[0]
    assert torch.allclose(found, expected, rtol=1e-12)


def test_a_missing_reward_is_in_no_group() -> None:
    assert group_advantages("grpo", [1.0, math.nan, 0.0], ["a"] * 3).tolist()[1] == 0
    assert group_advantages("dr_grpo", [1.0, math.nan, 0.0], ["a"] * 3).tolist() == [0.5, 0.0, -0.5]


@pytest.mark.parametrize("name", ADVANTAGES)
def test_one_value_alone_has_no_spread(name: str) -> None:
    assert group_advantages(name, [0.0], ["a"]).tolist() == [0.0]


def test_a_running_mean_is_corrected_for_its_start() -> None:
    """Without the correction it is 0.6 * (1 - 0.95^20) = 0.385 after 20 steps of mean 0.6."""
    baseline, weight = 0.0, 0.0
    for _ in range(20):
        baseline, weight = next_baseline(baseline, weight, torch.tensor([0.2, 1.0]), 0.95)
    assert (baseline, weight) == pytest.approx((0.6, 1 - 0.95**20))
    # Adam's moment after the values 1 and 3: (0.9 * 0.1 * 1 + 0.1 * 3) / (1 - 0.9^2).
    first = next_baseline(0.0, 0.0, torch.tensor([1.0]), 0.9)
    assert next_baseline(*first, torch.tensor([3.0]), 0.9) == pytest.approx((0.39 / 0.19, 0.19))
    assert next_baseline(0.0, 0.0, torch.tensor([1.0]), 1.0) == (0.0, 0.0)


NAMES = [
    ("grpo", {}),
    ("grpo", {"scale_rewards": "batch"}),
    ("reinforce++", {}),
    ("reinforce++_baseline", {}),
]


@pytest.mark.parametrize(("name", "options"), NAMES)
def test_a_difference_of_discounts_alone_keeps_its_size(name: str, options: dict[str, Any]) -> None:
    """Eight planners earned 1, one of them with two more hand-offs: 1 - 0.85^2 = 0.28 apart, and not -2.47 and 0.35."""
    earned = torch.ones(8, dtype=torch.float64)
    discounts = torch.tensor([1.0] * 7 + [0.85**2], dtype=torch.float64)
    found = estimate_advantages(name, discounts, ["g"] * 8, undiscounted=earned, **options).advantages
    difference = 1 - 0.85**2
    assert found.tolist() == pytest.approx([difference / 8] * 7 + [-difference * 7 / 8])
    # A reward that is a little lower does not magnify it.
    earned[-1] = 0.999
    nearly = estimate_advantages(name, earned * discounts, ["g"] * 8, undiscounted=earned, **options).advantages
    assert nearly.tolist() == pytest.approx(found.tolist(), abs=1e-3)


@pytest.mark.parametrize(("name", "options"), NAMES)
def test_advantages_are_divided_by_what_was_earned_before_discounts(name: str, options: dict[str, Any]) -> None:
    earned = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    discounts = torch.tensor([0.85, 0.85, 0.85**3, 0.85**3], dtype=torch.float64)
    found = estimate_advantages(name, earned * discounts, ["g"] * 4, undiscounted=earned, **options).advantages
    mean = (0.85 + 0.85**3) / 4
    expected = [value / (math.sqrt(1 / 3) + 1e-4) for value in (0.85 - mean, -mean, 0.85**3 - mean, -mean)]
    assert found.tolist() == pytest.approx(expected)


def test_what_was_divided_by_is_said() -> None:
    deviations = estimate_advantages("grpo", VALUES, GROUPS).deviations
    assert deviations is not None
    assert deviations.tolist() == pytest.approx([math.sqrt(0.5)] * 2 + [0, 0, 0])
    assert estimate_advantages("rloo", VALUES, GROUPS).deviations is None


def refused(name: str = "grpo", rewards: Tensor = VALUES, groups: list[str] = GROUPS, **options: Any) -> str:
    with pytest.raises(TrainingError) as raised:
        group_advantages(name, rewards, groups, **options)
    return str(raised.value)


def test_what_cannot_be_meant_is_refused() -> None:
    assert "group b: reward inf is not finite" in refused(rewards=torch.tensor([1.0, math.inf]), groups=["a", "b"])
    assert refused(groups=["a"]) == "got rewards of shape [5] for 1 group ids"
    assert "advantage 'gpro' is not known; expected one of grpo, dr_grpo, rloo" in refused("gpro")
    assert "advantage rloo has no option k; it has none" in refused("rloo", k=2)
    assert "scale_rewards is 'std', expected group, batch or none" in refused(scale_rewards="std")
    assert "max@k has k 1, expected at least 2; k 1 is rloo" in refused("max@k", k=1)
