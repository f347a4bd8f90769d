"""Two roles of a small random model that answer with one token, and what training makes of them.

Planner and executor see the same prompt. In `conflict` the planner earns by an even token, the executor by an odd one:
one adapter, which cannot tell the two apart, can please one of them only. In `routes` the planner's first token chooses
between two ways to the same end: one hand-off for an even token, three for an odd one.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from agl import semconv
from agl.config import Config
from agl.span import Span
from agl.tokens.packing import pack_logprobs
from agl.trajectory import Trajectory
from agl_trainer.algo.batch_builder import grpo_batch
from agl_trainer.algo.options import BatchOptions
from agl_trainer.compute.train_batch import role_states, train_batch
from agl_trainer.data.prefix_tree import pack_rows
from agl_trainer.model.attention import PackedPlan
from agl_trainer.model.policies import Policies
from agl_trainer.model.policy import Policy
from tests.trainer.rollout_maker import call, reward_on, trajectory
from tests.trainer.small_model import small_policy

ROLES = ("planner", "executor")
PROMPT = [5, 6, 7]
GROUPS, ROLLOUTS = 8, 8


class Team:
    """The policy of both roles, and their answers."""

    def __init__(self, agent_roles: dict[str, Any], seed: int, success: float = 0.8) -> None:
        """`success`: how often either way of `routes` ends well."""
        self.success = success
        train = {"model": "tiny", "agent": "a:b", "tasks": "a:b"}
        self.config = Config.parse({"agent_roles": agent_roles, "train": train})
        torch.manual_seed(seed)
        self.policy: Policy = small_policy(roles=self.config.agent_roles.roles, adapter_std=0.05)
        self.optimizers = {
            owner: torch.optim.AdamW(self.policy.parameters(owner), lr=0.01, weight_decay=0.0)
            for owner in self.policy.adapters
        }
        self.draw = torch.Generator().manual_seed(seed)
        self.luck = random.Random(seed)

    @torch.no_grad()
    def distribution(self, role: str) -> torch.Tensor:
        """Logprobs [V] of the next token of `role`."""
        packed = pack_rows([PROMPT])
        hidden = self.policy.hidden_states(packed.token_ids, packed.positions, [role], PackedPlan(packed))
        return (hidden[-1] @ self.policy.output_weight.T).log_softmax(-1)

    def answers(self, role: str, count: int) -> Iterator[Span]:
        """Up to `count` calls of `role`, each made when it is taken: a span's place in time is when it was made."""
        logprobs = self.distribution(role)
        tokens = torch.multinomial(logprobs.exp(), count, replacement=True, generator=self.draw).tolist()
        for token in tokens:
            recorded = {semconv.RESPONSE_LOGPROBS: pack_logprobs([float(logprobs[token])])}
            yield call(role, [token], PROMPT, **recorded)

    def odd(self, role: str) -> float:
        """Probability of an odd token."""
        return float(self.distribution(role).exp()[1::2].sum())

    def train(self, play: "Callable[[Team], Sequence[Trajectory]]", steps: int) -> None:
        for number in range(steps):
            states = role_states(self.config, Policies([self.policy]), number, {})
            batch = grpo_batch(play(self), states, BatchOptions.of(self.config))
            train_batch(self.policy, self.optimizers, batch, self.config)


def conflict(team: Team) -> list[Trajectory]:
    answers = zip(*(team.answers(role, GROUPS * ROLLOUTS) for role in ROLES), strict=True)
    return [
        trajectory(
            f"r{number}",
            planned,
            executed,
            reward_on(None, float(not _is_odd(planned)), "planner"),
            reward_on(None, float(_is_odd(executed)), "executor"),
            group_id=f"g{number // ROLLOUTS}",
        )
        for number, (planned, executed) in enumerate(answers)
    ]


def routes(team: Team) -> list[Trajectory]:
    """Either way succeeds as often."""
    made = []
    planner, executor = (team.answers(role, 2 * GROUPS * ROLLOUTS) for role in ROLES)
    for number in range(GROUPS * ROLLOUTS):
        calls = [next(planner), next(executor)]
        if _is_odd(calls[0]):
            calls += [next(planner), next(executor)]
        reward = reward_on(None, float(team.luck.random() < team.success))
        made.append(trajectory(f"r{number}", *calls, reward, group_id=f"g{number // ROLLOUTS}"))
    return made


def earned(team: Team) -> float:
    """Mean reward of both roles in `conflict`."""
    return (1 - team.odd("planner") + team.odd("executor")) / 2


def separate(gamma: float = 1.0) -> dict[str, Any]:
    return {"gamma": gamma} | {role: {"lora_r": 4} for role in ROLES}


def shared() -> dict[str, Any]:
    return {"gamma": 1.0, "planner": {"lora_r": 4}, "executor": {"adapter": "planner"}}


def _is_odd(span: Span) -> bool:
    return bool(span.attributes[semconv.RESPONSE_TOKEN_IDS][0] % 2)
