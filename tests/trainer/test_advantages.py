"""Group baselines in worked numbers."""

import math

import pytest
import torch

from agl.errors import TrainingError
from agl_trainer.advantages import group_baselines, group_statistics

VALUES = torch.tensor([1.0, 0.0, 5.0, 5.0, 2.0], dtype=torch.float64)
GROUPS = ["a", "a", "b", "b", "c"]
"""Two that differ, two that do not, and one alone; a group need not stand together."""
ORDER = [0, 2, 4, 3, 1]


def shuffled() -> tuple[torch.Tensor, list[str]]:
    return VALUES[ORDER], [GROUPS[place] for place in ORDER]


def back(values: torch.Tensor) -> list[float]:
    out = torch.empty_like(values)
    out[torch.tensor(ORDER)] = values
    return out.tolist()


def test_mean_and_unbiased_deviation_of_each_group() -> None:
    means, deviations = group_statistics(*shuffled())
    assert back(means) == [0.5, 0.5, 5.0, 5.0, 2.0]
    assert back(deviations) == pytest.approx([math.sqrt(0.5), math.sqrt(0.5), 0, 0, 0])


# The sum of squares around the mean of 2.6 is 21.2; a quarter of it is the variance.
BATCH = math.sqrt(21.2 / 4) + 1e-4


@pytest.mark.parametrize(
    ("scale", "divisors"),
    [
        ("group", [math.sqrt(0.5) + 1e-4] * 2 + [1e-4] * 3),
        ("batch", [BATCH] * 5),
        ("none", [1.0] * 5),
    ],
)
def test_what_advantages_are_divided_by(scale, divisors: list[float]) -> None:
    means, found = group_baselines(*shuffled(), scale)
    assert back(means) == [0.5, 0.5, 5.0, 5.0, 2.0]
    assert back(found) == pytest.approx(divisors, rel=1e-12)


def test_one_value_has_no_spread_in_a_batch() -> None:
    _, divisors = group_baselines(torch.tensor([3.0]), ["a"], "batch")
    assert divisors.tolist() == pytest.approx([1e-4])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_no_number_is_refused_by_its_group(bad: float) -> None:
    with pytest.raises(TrainingError, match=f"group b: reward {bad} is not finite"):
        group_statistics(torch.tensor([1.0, bad]), ["a", "b"])


def test_a_group_id_for_each_reward() -> None:
    with pytest.raises(TrainingError, match="got 2 rewards for 3 group ids"):
        group_statistics(torch.tensor([1.0, 0.0]), ["a", "a", "a"])
