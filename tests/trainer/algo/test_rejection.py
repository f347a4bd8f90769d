"""Rejection sampling: which rollouts are kept, and that what is kept trains by likelihood."""

from typing import Any

import pytest
import torch

from agl.config import Config
from agl.errors import ConfigError
from agl.trajectory import DropReason, Trajectory
from agl_trainer.algo.batch_builder import grpo_batch
from agl_trainer.algo.options import BatchOptions, RoleState
from agl_trainer.algo.rejection import Rejection
from agl_trainer.algo.sft_loss import sft_loss
from agl_trainer.compute.optimizer_step import optimizer_step
from agl_trainer.compute.train_batch import train_batch
from agl_trainer.data.rows import TrainingRow
from tests.trainer.rollout_maker import batch_options, call, reward_on, trajectory
from tests.trainer.small_model import small_policy

TRAIN: dict[str, Any] = {"model": "tiny", "algorithm": "rejection"}


def single(rollout_id: str, value: float, group_id: str = "g", *, first: int = 3) -> Trajectory:
    return trajectory(rollout_id, call("writer", [first, 4]), reward_on(None, value), group_id=group_id)


def reasons(made: list[Trajectory], rejection: Rejection) -> list[DropReason | None]:
    batch = grpo_batch(made, {"writer": RoleState()}, batch_options(rejection=rejection))
    outcomes = {outcome.call.rollout_id: outcome.reason for outcome in batch.outcomes}
    return [outcomes[one.rollout_id] for one in made]


def test_the_best_of_each_group_is_kept_or_what_reaches_a_reward() -> None:
    made = [single(f"g{i}", value) for i, value in enumerate([0.2, 0.9, 0.9])]
    made += [single(f"h{i}", 0.9, "h") for i in range(2)]
    rejected = DropReason.REJECTED
    assert reasons(made, Rejection()) == [rejected, None, rejected, rejected, rejected]
    assert reasons(made, Rejection(0.9)) == [rejected, None, None, None, None]
    assert reasons(made, Rejection(1.0)) == [rejected] * 5
    assert grpo_batch(made, {"writer": RoleState()}, batch_options(rejection=Rejection())).zero_variance_groups == ["h"]


def test_what_is_kept_takes_the_step_of_supervised_training() -> None:
    """The same adapter as `sft_loss` on the kept rows alone, each rollout weighing the same."""
    config = Config.parse({"agent_roles": {"gamma": 0.5, "writer": {"lora_r": 2}}, "train": TRAIN})
    made = [single(f"r{i}", value, first=10 + i) for i, value in enumerate([0.2, 0.9])]
    made += [single(f"s{i}", value, "h", first=20 + i) for i, value in enumerate([0.1, 0.0])]
    policies = [small_policy(roles=config.agent_roles.roles) for _ in range(2)]
    batch = grpo_batch(made, {"writer": RoleState()}, BatchOptions.of(config))
    steps = [torch.optim.SGD(policy.parameters("writer"), lr=0.1) for policy in policies]
    train_batch(policies[0], {"writer": steps[0]}, batch, config)
    assert [outcome.advantage for outcome in batch.outcomes if outcome.reason is None] == [1.0, 1.0]
    rows = [TrainingRow([1, 2, first, 4], [0, 0, 1, 1], 1 / 4) for first in (11, 20)]
    optimizer_step(policies[1], "writer", steps[1], rows, sft_loss, pack_tokens=4096, max_grad_norm=1.0)
    for one, other in zip(*(policy.parameters("writer") for policy in policies), strict=True):
        assert torch.allclose(one, other, atol=1e-7)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"epsilon": 0.1}, "epsilon does nothing with algorithm rejection"),
        ({"advantage": "rloo"}, "advantage does nothing with algorithm rejection"),
        ({"algorithm": "grpo", "min_reward": 0.5}, "min_reward does nothing without algorithm rejection"),
        ({"eval_every": 2}, "eval_every needs eval_tasks"),
        ({"early_stop": 2}, "early_stop does nothing without eval_every"),
        ({"sampling": {"top_k": 1}}, "top_k 1 always takes the likeliest token"),
        ({"sampling": {"logit_bias": {"7": 1}}}, "logit_bias cannot be declared: the trainer does not apply it"),
        ({"sampling": {"temperature": 0.7}}, "temperature cannot be declared.*; set train.temperature"),
        ({"sampling": {"top_p": 0.9}, "algorithm": "grpo", "minibatches": 2}, r"sampling.top_p keeps.*minibatches: 1"),
    ],
)
def test_keys_that_would_do_nothing_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.parse({"train": TRAIN | keys})
