"""Training on a sample of production: the expected gradient is that of all rollouts, with a bandit of two arms."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from agl.config import TrafficSamplingConfig
from agl.sampling import Unit, decide
from agl.sampling.rule import threshold_of
from agl.trajectory import Decision, Sampled, SamplingReason
from agl_trainer.algo.advantages import estimate_advantages, group_advantages, next_baseline
from agl_trainer.algo.batch_builder import grpo_batch
from agl_trainer.algo.normalization import row_weights
from agl_trainer.algo.options import RoleState
from tests.trainer.rollout_maker import batch_options, call, reward_on, trajectory

DRAWS, ROLLOUTS, SIZE, P = 2000, 128, 4, 0.3


def z_of(differences: Tensor) -> float:
    return float(differences.mean() / differences.std() * math.sqrt(len(differences)))


def draw(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Score of the arm, reward, number of rollouts that it stands for, and whether it is kept; of `count` rollouts.

    The policy pulls either arm with probability 1/2. Arm 1 earns 1 in 40 % of its pulls, else 0.1; arm 0 always earns
    0.5, which only chance keeps.
    """
    arms = torch.randint(2, (count,)).double()
    rewards = torch.where(arms == 1, torch.where(torch.rand(count) < 0.4, 1.0, 0.1), 0.5).double()
    is_certain = rewards.reshape(-1, SIZE).max(1).values >= 0.7
    is_kept = is_certain | (torch.rand(count // SIZE) < P)
    represented = torch.where(is_certain, 1.0, 1 / P).double()
    return arms - 0.5, rewards, represented.repeat_interleave(SIZE), is_kept.repeat_interleave(SIZE)


def test_the_probabilities_of_the_draw_are_those_of_sampling() -> None:
    config = TrafficSamplingConfig(base_rate=P, max_span_per_minute=None)
    for reward, probability in ((1.0, 1.0), (0.5, P), (0.1, P)):
        decision = decide(Unit("g", "shop", 0, SIZE, reward), config)
        assert decision is not None and decision.probability == pytest.approx(probability)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "ema"])
def test_rollouts_that_are_compared_in_their_group_or_with_the_past(name: str) -> None:
    """The draws are independent, so one call computes the advantages of all of them."""
    torch.manual_seed(4)
    scores, rewards, represented, kept = draw(DRAWS * ROLLOUTS)
    names = [str(index // SIZE) for index in range(DRAWS * ROLLOUTS)]
    terms = estimate_advantages(name, rewards, names, baseline=0.45).advantages * scores
    whole, sampled = terms.reshape(DRAWS, ROLLOUTS).mean(1), (terms * kept).reshape(DRAWS, ROLLOUTS)
    weighed = (sampled * represented.reshape(DRAWS, ROLLOUTS)).sum(1) / ROLLOUTS
    assert abs(z_of(weighed - whole)) < 3
    assert abs(z_of(sampled.sum(1) / kept.reshape(DRAWS, ROLLOUTS).sum(1) - whole)) > 50


@pytest.mark.parametrize(
    ("name", "options"),
    [("grpo", {"scale_rewards": "batch"}), ("reinforce++", {}), ("reinforce++_baseline", {}), ("gdpo", {})],
)
def test_rollouts_that_are_compared_with_their_batch(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(4)
    groups = [str(index // SIZE) for index in range(ROLLOUTS)]
    weighed, unweighed = torch.empty(DRAWS), torch.empty(DRAWS // 10)
    for number in range(DRAWS):
        scores, rewards, represented, kept = draw(ROLLOUTS)
        whole = float((estimate_advantages(name, rewards, groups, **options).advantages * scores).mean())
        names = [groups[index] for index in kept.nonzero()[:, 0].tolist()]
        scores, rewards, shares = scores[kept], rewards[kept], represented[kept]
        found = estimate_advantages(name, rewards, names, represented=shares, **options).advantages
        weighed[number] = float((shares * found * scores).sum() / ROLLOUTS) - whole
        if number < len(unweighed):
            found = estimate_advantages(name, rewards, names, **options).advantages
            unweighed[number] = float((found * scores).mean()) - whole
    assert abs(z_of(weighed)) < 3
    assert abs(z_of(unweighed)) > 10


def test_means_and_deviations_count_the_rollouts_that_a_kept_one_stands_for() -> None:
    rewards, shares = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 4.0])
    assert next_baseline(0.0, 0.0, rewards, 0.9, shares)[0] == pytest.approx(0.2)
    found = estimate_advantages("reinforce++", rewards, ["a", "b"], represented=shares)
    # Mean 0.2 and variance (1 * 0.64 + 4 * 0.04) / 5 = 0.16, of n = 5^2 / 17 equal ones: n / (n - 1) = 25 / 8.
    assert found.deviations is not None and found.deviations.tolist() == pytest.approx([math.sqrt(0.5)] * 2)
    assert found.advantages.tolist() == pytest.approx([value / (math.sqrt(0.5) + 1e-4) for value in (0.8, -0.2)])
    # Two dimensions, each alone in its group: nothing differs there, nor in the batch.
    parts = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert group_advantages("gdpo", parts, ["a", "b"], represented=shares).tolist() == [0, 0]


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++_baseline", "gdpo"])
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 0.7])
def test_equal_rewards_have_no_advantage_at_all(name: str, reward: float) -> None:
    for size in (2, 3, 6, 7, 8):
        shares = torch.full((size,), 1 / P, dtype=torch.float64)
        rewards = torch.full((size,), reward, dtype=torch.float64)
        assert not estimate_advantages(name, rewards, ["g"] * size, represented=shares).advantages.any()


def test_a_mean_over_tokens_counts_those_of_the_rows_that_a_row_stands_for() -> None:
    lengths, shares = torch.tensor([10, 30]), torch.tensor([0.5, 1.5])
    assert row_weights("dapo", lengths, ["a", "b"], 8, shares).tolist() == pytest.approx([0.5 / 50, 1.5 / 50])
    assert row_weights("grpo", lengths, ["a", "b"], 8, shares).tolist() == pytest.approx([0.5 / 20, 1.5 / 60])
    assert row_weights("rollout", lengths, ["a", "a"], 8, shares).tolist() == pytest.approx([0.5 / 40, 1.5 / 40])


@pytest.mark.parametrize("advantage", ["grpo", "gdpo"])
def test_a_row_of_either_role_weighs_as_many_rollouts_as_its_own_stands_for(advantage: str) -> None:
    """Of two groups alike, one kept for certain and one with probability 0.25; the mean of the store is 2.5."""
    certain, sampled = (
        [
            trajectory(f"{group}{n}", made := call("writer"), call("critic"), reward_on(made, n), reward_on(None, n))
            for n in (0, 1)
        ]
        for group in ("a", "b")
    )
    certain, sampled = (
        [replace(one, group_id=name) for one in some] for name, some in (("a", certain), ("b", sampled))
    )
    decision = Decision("b", True, SamplingReason.BASE_RATE, threshold_of(0.25))
    summary = Sampled(decision, "b", "prod", 1, 1, 0, 0, ("writer",), (), None, None)
    roles = {"writer": RoleState(), "critic": RoleState()}
    kept = [*certain, *(replace(each, sampled=summary) for each in sampled)]
    batch = grpo_batch(kept, roles, batch_options(represented=2.5, advantage=advantage))
    plain = grpo_batch([*certain, *sampled], roles, batch_options(advantage=advantage))
    for role in roles:
        weights = [(row.weight, other.weight) for row, other in zip(batch.rows[role], plain.rows[role], strict=True)]
        assert [weight / other for weight, other in weights] == pytest.approx([0.4, 0.4, 1.6, 1.6])
        assert batch.represented[role] == pytest.approx([0.4, 0.4, 1.6, 1.6])
