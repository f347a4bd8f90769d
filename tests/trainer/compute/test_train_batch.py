"""The optimizer steps of a configuration: which adapters change, and the outcomes of calls whose step was skipped."""

import math
from typing import Any

import pytest
import torch

from agl.config import Config
from agl.trajectory import DropReason, Trajectory
from agl_trainer.algo.batch import GrpoBatch
from agl_trainer.algo.batch_builder import grpo_batch
from agl_trainer.algo.options import BatchOptions
from agl_trainer.compute.train_batch import role_states, train_batch
from agl_trainer.model.policies import Policies
from agl_trainer.model.policy import Policy
from tests.trainer.rollout_maker import call, reward_on, trajectory
from tests.trainer.small_model import plain_logits, plain_model, small_model, small_policy

TRAIN = {"model": "tiny", "agent": "a:b", "tasks": "a:b"}


def config_of(agent_roles: dict[str, Any], **train: Any) -> Config:
    return Config.parse({"agent_roles": agent_roles, "train": TRAIN | {"scale_rewards": "none"} | train})


def team(index: int, value: float) -> Trajectory:
    calls = call("writer", [10 + index, 11]), call("fixer", [20, 21 + index])
    return trajectory(f"r{index}", *calls, reward_on(None, value), group_id=f"g{index // 2}")


def step(config: Config, policy: Policy, number: int = 0, rewards: tuple[float, ...] = (1.0, 0.0)) -> GrpoBatch:
    states = role_states(config, Policies([policy]), number, {})
    batch = grpo_batch([team(i, value) for i, value in enumerate(rewards)], states, BatchOptions.of(config))
    optimizers = {owner: torch.optim.SGD(policy.parameters(owner), lr=0.1) for owner in policy.adapters}
    train_batch(policy, optimizers, batch, config)
    return batch


def moved(config: Config, number: int = 0) -> list[str]:
    """Adapters that step `number` changes."""
    policy = small_policy(roles=config.agent_roles.roles)
    before = {owner: [p.detach().clone() for p in policy.parameters(owner)] for owner in policy.adapters}
    step(config, policy, number)
    return [
        owner for owner, parameters in before.items() if not all(map(torch.equal, parameters, policy.parameters(owner)))
    ]


def test_roles_train_together_in_turn_or_not_at_all() -> None:
    both: dict[str, Any] = {"writer": {"lora_r": 2}, "fixer": {"lora_r": 2}}
    assert moved(config_of(both)) == ["writer", "fixer"]
    alternating = config_of(both, alternate_steps=2)
    assert [moved(alternating, number) for number in range(5)] == [
        [name] for name in ["writer", "writer", "fixer", "fixer", "writer"]
    ]
    frozen = both | {"fixer": {"lora_r": 2, "frozen": True}}
    assert moved(config_of(frozen)) == ["writer"]
    assert moved(config_of(frozen, alternate_steps=1), 1) == ["writer"]


def test_roles_that_share_an_adapter_take_one_step_with_the_sum_of_their_gradients() -> None:
    shared = config_of({"gamma": 1.0, "writer": {"lora_r": 2}, "fixer": {"adapter": "writer"}}, max_grad_norm=1e9)
    policies = [small_policy(roles=shared.agent_roles.roles) for _ in range(3)]
    start = [p.detach().clone() for p in policies[0].parameters("writer")]
    step(shared, policies[0])
    for policy, role in zip(policies[1:], ("writer", "fixer"), strict=True):
        states = {role: role_states(shared, Policies([policy]), 0, {})[role]}
        batch = grpo_batch([team(0, 1.0), team(1, 0.0)], states, BatchOptions.of(shared))
        optimizer = torch.optim.SGD(policy.parameters("writer"), lr=0.1)
        train_batch(policy, {"writer": optimizer}, batch, shared)
    for begun, both, one, other in zip(start, *(p.parameters("writer") for p in policies), strict=True):
        assert torch.allclose(both - begun, (one - begun) + (other - begun), rtol=1e-3, atol=1e-6)


def test_each_adapter_has_a_reference_of_its_own() -> None:
    """With its own adapter as reference the KL term is 0; without, the reference is the base model."""
    config = config_of({"writer": {"lora_r": 2}, "fixer": {"lora_r": 2}}, beta=0.1)
    policy = small_policy(roles=config.agent_roles.roles)
    states = role_states(config, Policies([policy]), 0, {})
    batch = grpo_batch([team(0, 1.0), team(1, 0.0)], states, BatchOptions.of(config))
    optimizers = {owner: torch.optim.SGD(policy.parameters(owner), lr=0.1) for owner in policy.adapters}
    stats = train_batch(policy, optimizers, batch, config, {"writer": policy.adapter("writer")})
    assert stats["writer"].metrics["kl_ref"] == pytest.approx(0.0, abs=1e-9)
    assert stats["fixer"].metrics["kl_ref"] > 1e-3


def test_calls_of_a_step_that_was_not_taken_are_counted_so() -> None:
    config = config_of({"writer": {"lora_r": 2}, "fixer": {"lora_r": 2}}, minibatches=2)
    policy = small_policy(roles=config.agent_roles.roles)
    with torch.no_grad():
        policy.parameters("fixer")[0].fill_(math.nan)
    batch = step(config, policy, rewards=(1.0, 0.0, 1.0, 0.0))
    assert batch.dropped() == {DropReason.SKIPPED_STEP: 4}
    assert {outcome.call.role for outcome in batch.outcomes if outcome.reason is None} == {"writer"}
    assert sum(batch.dropped().values()) + 4 == len(batch.outcomes) == 8


def test_the_ratio_of_each_token_is_recorded_as_the_loss_had_it() -> None:
    """exp(logprob + 0.5): -0.5 was recorded for each token. The second step has the policy after the first."""
    config = config_of({"writer": {"lora_r": 2}}, minibatches=2)
    policy = small_policy(roles=config.agent_roles.roles)
    trained = {one.call.rollout_id: one for one in step(config, policy, rewards=(1.0, 0.0) * 2).outcomes if one.ratios}
    assert list(trained) == ["r0", "r1", "r2", "r3"]
    before = small_policy(roles=config.agent_roles.roles)
    for index in range(4):
        if index == 2:
            step(config, before)
        ids = [1, 2, 10 + index, 11]
        with torch.no_grad():
            logprobs = plain_logits(plain_model(before, "writer", small_model()), ids).log_softmax(-1)
        expected = [(logprobs[place - 1, ids[place]] + 0.5).exp().item() for place in (2, 3)]
        assert trained[f"r{index}"].ratios == pytest.approx(expected, rel=1e-4)
    sequences = step(config_of({"writer": {"lora_r": 2}}, importance_sampling_level="sequence"), before)
    assert all(len(one.ratios) == 2 == 1 + len(set(one.ratios)) for one in sequences.outcomes if one.reason is None)


def test_the_ratio_to_the_policy_before_the_training_step_is_exactly_one_until_it_moves() -> None:
    config = config_of({"writer": {"lora_r": 2}}, minibatches=2, importance_sampling_mode="token_truncate")
    batch = step(config, small_policy(roles=config.agent_roles.roles), rewards=(1.0, 0.0) * 2)
    ratios = [list(one.ratios) for one in batch.outcomes if one.reason is None]
    assert ratios[:2] == [[1.0, 1.0]] * 2
    assert all(0.0 < abs(ratio - 1) < 0.5 for of_call in ratios[2:] for ratio in of_call)


def test_the_configuration_reaches_the_loss() -> None:
    """With a weight on the divergence from the base model everything trains; the loss of a sequence is another."""
    agent_roles: dict[str, Any] = {"writer": {"lora_r": 2}, "fixer": {"lora_r": 2}}
    policy = small_policy(roles=config_of(agent_roles).agent_roles.roles)
    assert step(config_of(agent_roles), policy, rewards=(1.0, 1.0)).dropped() == {DropReason.ZERO_ADVANTAGE: 4}
    assert step(config_of(agent_roles, beta=0.1), policy, rewards=(1.0, 1.0)).dropped() == {}
    everything = {
        "loss": "dapo",
        "normalization": "rollout",
        "entropy_coef": 0.01,
        "top_entropy_quantile": 0.5,
        "delta": 3.0,
    }
    correction = {"importance_sampling_mode": "sequence_truncate", "importance_sampling_level": "sequence"}
    assert step(config_of(agent_roles, **everything, **correction), policy).dropped() == {}
