"""Does every advantage and every loss learn, from new rollouts, from old ones and from a store?

.venv/bin/python -m benchmarks.learning 0 1 2

Two roles of a small random model answer the same prompt with one to three tokens. A token is good for the planner if
its first output weight is positive, for the executor if it is negative, and a rollout earns the mean of both shares of
good tokens. So the best policies earn 1 and random ones about 0.5, and each role has to find its part in a reward that
both share. Rollouts are new (synchronous), of the policies two steps ago (asynchronous), or all of the first policies,
written to a store and read in turn. No engine and no agent run: the toy samples from the model itself.

Prints Markdown: the reward after the last step, of 32 rollouts each, and the steps until it was 90 % of the best, as
means over the seeds.
"""

import agl_trainer  # noqa: F401  # before torch, which reads how long an idle thread spins

# isort: split
import argparse
import random
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from multiprocessing import get_context
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch

from agl import semconv
from agl.config import AdvantageName, Config, LossName
from agl.span import Span
from agl.store import open_store
from agl.tokens.packing import pack_logprobs
from agl.trajectory import Trajectory
from agl_trainer.algo.advantages import next_baseline
from agl_trainer.algo.batch_builder import grpo_batch
from agl_trainer.algo.options import BatchOptions
from agl_trainer.compute.train_batch import role_states, train_batch
from agl_trainer.data.prefix_tree import pack_rows
from agl_trainer.model.attention import PackedPlan
from agl_trainer.model.policies import Policies
from agl_trainer.rollout.traces import load_groups, stored_groups
from tests.trainer.rollout_maker import call, reward_on, trajectory
from tests.trainer.small_model import small_model, small_policy

ROLES = {"planner": 1, "executor": -1}
"""Role to the sign of the first output weight of its good tokens."""
PROMPT = [5, 6, 7]
GROUPS, GROUP_SIZE, LAG = 4, 8, 2
WAYS = ("synchronous", "asynchronous", "from store")
SETTINGS: dict[str, dict[str, Any]] = {
    "grpo, the default": {},
    **{f"advantage: {name}": {"advantage": name} for name in get_args(AdvantageName) if name != "grpo"},
    **{f"loss: {name}": {"loss": name} for name in get_args(LossName) if name != "grpo"},
    "loss: grpo, a ratio per sequence": {"importance_sampling_level": "sequence"},
    "algorithm: rejection": {"algorithm": "rejection"},
}
"""Rows of the table, and their keys of `train`."""
Play = list[tuple[list[Span], Trajectory, float]]
"""The calls of each rollout, the rollout as it trains, and its reward."""


@dataclass
class Team:
    """The policies of both roles, and a training of them."""

    config: Config
    seed: int
    learning_rate: float
    baselines: dict[str, tuple[float, float]] = field(default_factory=dict)
    played: int = 0

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        model = small_model(layers=1)
        model.get_decoder().norm.weight.mul_(2)  # so that the last hidden state can make a policy sure of its tokens
        self.policy = small_policy(model, self.config.agent_roles.roles, adapter_std=0.05)
        self.signs = self.policy.output_weight[:, 0].sign().int().tolist()
        self.optimizers = {
            role: torch.optim.AdamW(self.policy.parameters(role), lr=self.learning_rate, weight_decay=0.0)
            for role in ROLES
        }
        self.draw, self.lengths = torch.Generator().manual_seed(self.seed), random.Random(self.seed)

    @torch.no_grad()
    def answers(self, role: str) -> Iterator[tuple[list[int], list[float]]]:
        """Tokens and logprobs of one answer of `role` in each rollout."""
        rows, logprobs = [list(PROMPT) for _ in range(GROUPS * GROUP_SIZE)], []
        for _ in range(3):
            packed = pack_rows(rows)
            hidden = self.policy.hidden_states(packed.token_ids, packed.positions, [role], PackedPlan(packed))
            last = torch.stack([index[-1] for index in packed.row_index])
            scores = (hidden[last] @ self.policy.output_weight.T).log_softmax(-1)
            tokens = torch.multinomial(scores.exp(), 1, generator=self.draw)
            logprobs.append(scores.gather(1, tokens)[:, 0].tolist())
            for row, token in zip(rows, tokens[:, 0].tolist(), strict=True):
                row.append(token)
        for row, recorded in zip(rows, zip(*logprobs, strict=True), strict=True):
            length = self.lengths.randint(1, 3)
            yield row[len(PROMPT) :][:length], list(recorded[:length])

    def play(self) -> Play:
        """Rollouts of a step under the current policies."""
        found = []
        for number, answers in enumerate(zip(*map(self.answers, ROLES), strict=True)):
            reward = mean(
                mean(self.signs[token] == good for token in tokens)
                for (tokens, _), good in zip(answers, ROLES.values(), strict=True)
            )
            spans = [
                call(role, tokens, PROMPT, **{semconv.RESPONSE_LOGPROBS: pack_logprobs(logprobs)})
                for role, (tokens, logprobs) in zip(ROLES, answers, strict=True)
            ]
            spans.append(reward_on(None, reward))
            name = f"{self.played}-g{number // GROUP_SIZE}"
            made = trajectory(f"{name}-r{number}", *spans, group_id=name)
            found.append((spans, made, reward))
        self.played += 1
        return found

    def train(self, trajectories: Sequence[Trajectory], step: int) -> None:
        baselines = {role: baseline for role, (baseline, _) in self.baselines.items()}
        states = role_states(self.config, Policies([self.policy]), step, baselines)
        batch = grpo_batch(trajectories, states, BatchOptions.of(self.config))
        train_batch(self.policy, self.optimizers, batch, self.config)
        for role, credits in batch.credits.items():
            decay = self.config.require_train().ema_decay
            self.baselines[role] = next_baseline(*self.baselines.get(role, (0.0, 0.0)), torch.tensor(credits), decay)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", type=int, nargs="+")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    arguments = parser.parse_args()
    seeds = arguments.seeds
    run = partial(rewards_of, steps=arguments.steps, learning_rate=arguments.learning_rate)
    print(f"| `train` | {' | '.join(f'{way} | steps' for way in WAYS)} |")
    print(f"|---|{'---:|---:|' * len(WAYS)}")
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        runs = pool.map(run, *zip(*product(SETTINGS.values(), WAYS, seeds), strict=True))
        for name in SETTINGS:
            cells = [_cell([next(runs) for _ in seeds]) for _ in WAYS]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


def _cell(runs: Sequence[Sequence[float]]) -> str:
    """Last reward and steps to 90 % of the best, of one run per seed."""
    steps = [next((step for step, reward in enumerate(run) if reward >= 0.9), None) for run in runs]
    reached = [step for step in steps if step is not None]
    ended = f"{mean(reached):.1f}" if reached else "-"
    note = f" ({len(reached)} of {len(runs)} seeds)" if len(reached) < len(runs) else ""
    return f"{mean(run[-1] for run in runs):.3f} | {ended}{note}"


def rewards_of(train: dict[str, Any], way: str, seed: int, *, steps: int, learning_rate: float) -> list[float]:
    """Mean reward under the policies before each step, and after the last."""
    torch.set_num_threads(1)
    roles = {role: {"lora_r": 4} for role in ROLES}
    keys = {"model": "tiny", "agent": "a:b", "tasks": "a:b", "max_tokens": 3}
    team = Team(Config.parse({"agent_roles": roles, "train": keys | train}), seed, learning_rate)
    rewards = []
    with TemporaryDirectory() as folder:
        batches = stored(team, folder) if way == "from store" else deque(trajectories(team.play()) for _ in range(LAG))
        for step in range(steps):
            play = team.play()
            rewards.append(mean(reward for *_, reward in play))
            if way == "synchronous":
                team.train(trajectories(play), step)
            else:
                team.train(batches[0], step)
                batches.append(batches[0] if way == "from store" else trajectories(play))
                batches.popleft()
    return [*rewards, mean(reward for *_, reward in team.play())]


def trajectories(play: Play) -> list[Trajectory]:
    return [made for _, made, _ in play]


def stored(team: Team, folder: str) -> deque[list[Trajectory]]:
    """Rollouts of eight steps under the first policies, written to a store and read back."""
    store = open_store(f"sqlite:///{folder}/agl.db")
    for _ in range(8):
        store.append_spans([span for spans, *_ in team.play() for span in spans])
    groups = stored_groups(store, team.config.require_train().traces)
    steps = deque(load_groups(store, groups[first : first + GROUPS]) for first in range(0, len(groups), GROUPS))
    store.close()
    return steps


if __name__ == "__main__":
    main()
