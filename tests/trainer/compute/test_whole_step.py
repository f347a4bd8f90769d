"""Whole training steps against an implementation apart from ours: rows padded, PEFT's adapters, formulas written out.

Two roles hand over to each other, with gamma 0.85. The planner's calls continue one row, each of the executor's is its
own row. Rollouts differ in their numbers of calls and tokens, and one group earns nothing by comparison.
"""

import functools
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import pytest
import torch
from torch import Tensor

from agl import semconv
from agl.config import Config, LossName, Normalization
from agl.span import Span
from agl.tokens.packing import pack_logprobs
from agl_trainer.algo.batch_builder import grpo_batch
from agl_trainer.algo.options import BatchOptions
from agl_trainer.compute.train_batch import role_states, train_batch
from agl_trainer.model.lora import BASE
from agl_trainer.model.policies import Policies
from agl_trainer.model.policy import Policy
from tests.trainer.rollout_maker import call, reward_on, trajectory
from tests.trainer.small_model import plain_model, small_model, small_policy

GAMMA, MAX_TOKENS = 0.85, 9
REWARDS = [(0, 1.0), (0, 0.0), (0, 0.4), (1, -1.0), (1, 2.0), (2, 0.5), (2, 0.5)]
"""Group and reward of each rollout."""
ROUNDS = [2, 1, 3, 1, 2, 2, 2]
"""Planner and executor have so many calls each."""
OWN_NORMALIZATION: dict[str, Normalization] = {
    "grpo": "rollout",
    "bnpo": "bnpo",
    "dr_grpo": "dr_grpo",
    "dapo": "dapo",
    "cispo": "cispo",
    "sapo": "rollout",
    "luspo": "luspo",
    "vespo": "vespo",
}


# --- the implementation apart from ours -----------------------------------------------------------------------------


@dataclass
class PlainCall:
    role: str
    prompt: list[int]
    response: list[int]
    old: list[float] = field(default_factory=list)
    """Recorded logprobs of the response."""
    advantage: float = 0.0


@dataclass
class PlainRow:
    rollout: int
    calls: list[PlainCall]

    @property
    def ids(self) -> list[int]:
        return self.calls[-1].prompt + self.calls[-1].response


def play() -> list[list[PlainCall]]:
    """The calls of each rollout, in order. A planner's prompt has all that it said before; the executor's has not."""
    draw = random.Random(5)
    tokens = functools.partial(draw.choices, range(10, 390))
    rollouts = []
    for (group, _), rounds in zip(REWARDS, ROUNDS, strict=True):
        calls, context = [], [group, 2, 3]
        for _ in range(rounds):
            planned = PlainCall("planner", context, tokens(k=draw.randint(2, 6)))
            executed = PlainCall("executor", [group, 4, *tokens(k=3)], tokens(k=draw.randint(1, 5)))
            calls += [planned, executed]
            context = [*context, *planned.response, *tokens(k=2)]
        rollouts.append(calls)
    set_advantages(rollouts)
    return rollouts


def rows_of(rollouts: list[list[PlainCall]], role: str) -> list[PlainRow]:
    rows = []
    for rollout, calls in enumerate(rollouts):
        own = [call for call in calls if call.role == role]
        rows += [PlainRow(rollout, own)] if role == "planner" else [PlainRow(rollout, [call]) for call in own]
    return rows


def set_advantages(rollouts: list[list[PlainCall]]) -> None:
    for role in ("planner", "executor"):
        discounts = [
            [GAMMA ** (len(calls) - 1 - i) for i, call in enumerate(calls) if call.role == role] for calls in rollouts
        ]
        rewards = torch.tensor([reward for _, reward in REWARDS], dtype=torch.float64)
        # A negative reward reaches all calls undiscounted.
        factors = [[1.0] * len(d) if reward < 0 else d for d, reward in zip(discounts, rewards, strict=True)]
        means = torch.tensor([sum(f) / len(f) for f in factors], dtype=torch.float64)
        for group in range(3):
            members = [i for i, (of, _) in enumerate(REWARDS) if of == group]
            earned, whole = (means * rewards)[members], rewards[members]
            divisor = whole.std() + 1e-4 if whole.std() >= (whole - earned).std() else 1.0
            for index, advantage in zip(members, (earned - earned.mean()) / divisor, strict=True):
                own = [call for call in rollouts[index] if call.role == role]
                for made, factor in zip(own, factors[index], strict=True):
                    made.advantage = float(advantage * factor / means[index])


@dataclass(frozen=True)
class PlainBatch:
    """[B, L - 1]: of the rows of a role, what is predicted at each token but the last."""

    rollouts: list[int]
    logprobs: Tensor
    reference: Tensor
    old: Tensor
    advantages: Tensor
    mask: Tensor


def padded_logprobs(model: torch.nn.Module, rows: list[PlainRow]) -> Tensor:
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True)
    attention = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row.ids)) for row in rows], batch_first=True)
    logits = model(input_ids=ids, attention_mask=attention.long(), use_cache=False).logits
    return logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]


def plain_batch(model: torch.nn.Module, base: torch.nn.Module, rows: list[PlainRow]) -> PlainBatch:
    """Also records the old logprobs of each call: those of the model, moved by up to 0.5."""
    logprobs = padded_logprobs(model, rows)
    with torch.no_grad():
        reference = padded_logprobs(base, rows)
    old, advantages, mask = (torch.zeros_like(logprobs) for _ in range(3))
    noise = torch.Generator().manual_seed(7)
    for index, row in enumerate(rows):
        for made in row.calls:
            start, end = len(made.prompt) - 1, len(made.prompt) + len(made.response) - 1
            moved = logprobs[index, start:end].detach() + torch.rand(end - start, generator=noise) - 0.5
            made.old = moved.float().tolist()
            old[index, start:end] = moved.float()
            advantages[index, start:end] = made.advantage
            mask[index, start:end] = 1
    return PlainBatch([row.rollout for row in rows], logprobs, reference, old, advantages, mask)


Level = Literal["token", "sequence"]


def plain_losses(name: str, batch: PlainBatch, level: Level, beta: float) -> Tensor:
    """The loss of each token."""
    mask, advantages = batch.mask, batch.advantages
    log_ratio = (batch.logprobs - batch.old) * mask
    of_row = log_ratio.sum(1, keepdim=True)
    if level == "sequence":
        log_ratio = (of_row / mask.sum(1, keepdim=True)).expand_as(mask)
    ratio = log_ratio.exp()
    if name == "cispo":
        losses = -ratio.clamp(max=5.0).detach() * advantages * batch.logprobs
    elif name == "sapo":
        tau = torch.where(advantages > 0, 1.0, 1.05)
        losses = -4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantages
    elif name == "vespo":
        k, slope = torch.where(advantages >= 0, 2.0, 3.0), torch.where(advantages >= 0, 3.0, 2.0)
        w = of_row.exp().expand_as(mask)
        losses = -(w**k * torch.exp(slope * (1 - w))).detach() * advantages * batch.logprobs
    else:
        low, high = (0.9997, 1.0004) if level == "sequence" else (0.8, 1.2)
        losses = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    log_r = batch.reference - batch.logprobs
    return losses + beta * ratio * (log_r.exp() - log_r - 1)


def plain_loss(normalization: Normalization, batch: PlainBatch, losses: Tensor) -> Tensor:
    """The loss of the step."""
    sums, lengths = (losses * batch.mask).sum(1), batch.mask.sum(1)
    match normalization:
        case "rollout":
            numbers = sorted(set(batch.rollouts))
            rows = [[i for i, of in enumerate(batch.rollouts) if of == number] for number in numbers]
            return torch.stack([sums[own].sum() / lengths[own].sum() for own in rows]).mean()
        case "grpo" | "sapo":
            return (sums / lengths).mean()
        case "dr_grpo":
            return sums.mean() / MAX_TOKENS
        case "luspo":
            return sums.mean()
        case _:
            return sums.sum() / lengths.sum()


# --- ours, and the comparison ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """One policy, its rollouts as spans, and the same rollouts as padded batches of PEFT models."""

    policy: Policy
    spans: list[list[Span]]
    models: Mapping[str, torch.nn.Module]
    batches: dict[str, PlainBatch]

    def expected(
        self, name: str, normalization: Normalization, level: Level, beta: float
    ) -> dict[str, tuple[float, Tensor]]:
        """Loss and gradient of each role."""
        found = {}
        for role, batch in self.batches.items():
            loss = plain_loss(normalization, batch, plain_losses(name, batch, level, beta))
            weights = [p for key, p in self.models[role].named_parameters() if "lora_" in key]
            gradients = torch.autograd.grad(loss, weights, retain_graph=True)
            found[role] = (loss.item(), torch.cat([gradient.flatten() for gradient in gradients]))
        return found

    def found(self, **train: Any) -> dict[str, tuple[float, Tensor]]:
        """Loss of each role's optimizer step, and its gradient: how far gradient descent moves the weights."""
        config = config_of(**train)
        options = BatchOptions.of(config)
        made = [
            trajectory(f"r{number}", *spans, reward_on(None, reward), group_id=f"g{group}")
            for number, (spans, (group, reward)) in enumerate(zip(self.spans, REWARDS, strict=True))
        ]
        batch = grpo_batch(made, role_states(config, Policies([self.policy]), 0, {}), options)
        optimizers = {role: torch.optim.SGD(self.policy.parameters(role), lr=1.0) for role in self.batches}
        before = {role: self.weights(role) for role in self.batches}
        stats = train_batch(self.policy, optimizers, batch, config)
        found = {}
        for role, start in before.items():
            found[role] = (stats[role].metrics["loss"], start - self.weights(role))
            torch.nn.utils.vector_to_parameters(start, self.policy.parameters(role))
        return found

    def weights(self, role: str) -> Tensor:
        return torch.nn.utils.parameters_to_vector(self.policy.parameters(role)).detach().clone()


def config_of(**train: Any) -> Config:
    keys = {"model": "tiny", "agent": "a:b", "tasks": "a:b", "max_tokens": MAX_TOKENS, "max_grad_norm": 1e9}
    roles = {role: {"lora_r": 4} for role in ("planner", "executor")}
    return Config.parse({"agent_roles": {"gamma": GAMMA, **roles}, "train": keys | train})


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    policy = small_policy(small_model(dtype=torch.float64), config_of().agent_roles.roles)
    rollouts = play()
    models = {role: plain_model(policy, role, small_model(dtype=torch.float64)) for role in policy.adapters}
    base = plain_model(policy, BASE, small_model(dtype=torch.float64))
    batches = {role: plain_batch(model, base, rows_of(rollouts, role)) for role, model in models.items()}
    spans = [[span_of(made) for made in calls] for calls in rollouts]
    return Comparison(policy, spans, models, batches)


def span_of(made: PlainCall) -> Span:
    return call(made.role, made.response, made.prompt, **{semconv.RESPONSE_LOGPROBS: pack_logprobs(made.old)})


def check(found: dict[str, tuple[float, Tensor]], expected: dict[str, tuple[float, Tensor]]) -> None:
    for role, (loss, gradient) in expected.items():
        assert found[role][0] == pytest.approx(loss, rel=1e-6)
        assert gradient.norm() > 0
        assert (found[role][1] - gradient).norm() <= 1e-6 * gradient.norm()


@pytest.mark.parametrize("normalization", [None, *get_args(Normalization)])
@pytest.mark.parametrize("name", get_args(LossName))
def test_loss_and_gradient_of_a_step_are_those_of_padded_rows(
    comparison: Comparison, name: str, normalization: Normalization | None
) -> None:
    expected = comparison.expected(name, normalization or OWN_NORMALIZATION[name], "token", 0.0)
    check(comparison.found(loss=name, normalization=normalization), expected)


@pytest.mark.parametrize("name", get_args(LossName))
def test_so_are_those_with_a_ratio_per_sequence_and_a_reference(comparison: Comparison, name: str) -> None:
    """Clipped losses bound the ratio of a sequence by 3e-4 below 1 and 4e-4 above it."""
    expected = comparison.expected(name, OWN_NORMALIZATION[name], "sequence", 0.1)
    check(comparison.found(loss=name, importance_sampling_level="sequence", beta=0.1), expected)
