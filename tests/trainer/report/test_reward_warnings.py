"""Warnings about rewards: each on the kind of training that deserves it, and on no other."""

import random

import pytest

from agl_trainer.report.reward_warnings import WINDOW, RewardWatch, reward_warnings


def steps(number: int = WINDOW, **metrics: object) -> list[dict[str, float]]:
    """Metrics of steps; a function gets the step's number. `_` stands for `/`."""
    return [
        {"groups": 8.0, "groups/zero_variance": 0.0, "reward/std": 0.2}
        | {name.replace("__", "/"): value(step) if callable(value) else value for name, value in metrics.items()}  # type: ignore[misc]
        for step in range(number)
    ]


def test_a_binary_reward_whose_groups_do_not_vary() -> None:
    binary = {"reward__mean": 0.2, "reward__std": 0.4}
    (warning,) = reward_warnings(steps(**binary, groups__zero_variance=5.0)).values()
    assert "the reward is 0 or 1, and in 15 of 24 groups all rollouts earned the same (mean 0.20)" in warning
    assert "easier tasks" in warning
    assert not reward_warnings(steps(**binary, groups__zero_variance=4.0))
    assert not reward_warnings(steps(2, **binary, groups__zero_variance=8.0))
    # Not binary: rewards of mean 0.2 with a smaller spread.
    assert not reward_warnings(steps(reward__mean=0.2, reward__std=0.3, groups__zero_variance=8.0))


def test_a_part_that_is_saturated() -> None:
    varied = steps(3, reward__mean=0.5, reward__syntax=0.6, reward__syntax_std=0.5)
    full = steps(reward__mean=0.5, reward__syntax=1.0, reward__syntax_std=0.0)
    (name,) = reward_warnings(varied + full)
    assert name == "saturated syntax"
    # A part that never varied is a constant from the first step on, and no news; one that varies is none at all.
    assert not reward_warnings(full)
    assert not reward_warnings(varied + steps(reward__mean=0.5, reward__syntax=0.95, reward__syntax_std=0.2))
    assert not reward_warnings(
        varied + steps(reward__mean=1.0, reward__std=0.0, reward__syntax=1.0, reward__syntax_std=0.0)
    )


def test_a_part_that_falls_while_the_reward_rises() -> None:
    parts = {"reward__style_std": 0.2, "reward__goal_std": 0.2, "reward__goal": lambda step: 0.1 * step}
    hacked = steps(reward__mean=lambda step: 0.1 * step, reward__style=lambda step: 0.9 - 0.05 * step, **parts)
    (warning,) = reward_warnings(hacked).values()
    assert "the reward rises (0 to 0.7 in 8 steps) while its part style falls (0.9 to 0.55)" in warning
    # Not while the reward is flat, or falls with it, or the part is flat.
    for mean, style in (
        (0.5, lambda step: 0.9 - 0.05 * step),
        (lambda step: -0.1 * step,) * 2,
        (lambda step: step, 0.5),
    ):
        assert not reward_warnings(steps(reward__mean=mean, reward__style=style, **parts))


@pytest.mark.parametrize("seed", range(3))
def test_noise_is_no_reward_hacking(seed: int) -> None:
    """500 windows of flat rewards with noise: one side is passed in about 0.4 % of them, both in none."""
    noise = random.Random(seed)
    found = 0
    for _ in range(500):
        found += len(
            reward_warnings(
                steps(
                    reward__mean=lambda _: noise.gauss(0.5, 0.05),
                    reward__style=lambda _: noise.gauss(0.5, 0.05),
                    reward__style_std=0.2,
                )
            )
        )
    assert found == 0


def test_a_warning_is_given_once_and_a_resumed_training_remembers_its_steps() -> None:
    stuck = steps(4, reward__mean=0.2, reward__std=0.4, groups__zero_variance=8.0)
    watch = RewardWatch()
    assert [len(watch.add(step)) for step in stuck] == [0, 0, 1, 0]
    stored = {name: [(step, metrics[name]) for step, metrics in enumerate(stuck[:2])] for name in stuck[0]}
    assert len(RewardWatch.of(stored | {"sft/loss": [(7, 1.0)]}).add(stuck[2])) == 1
