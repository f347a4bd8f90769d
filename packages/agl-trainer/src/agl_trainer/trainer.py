"""The training of a configuration: supervised steps, GRPO steps, evaluations, and a checkpoint after every step."""

import logging
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch

from agl.config import Config
from agl.errors import ConfigError, TrainingError
from agl.store import Resource, Rollout
from agl.trajectory import Trajectory, build_trajectory
from agl_trainer import rng
from agl_trainer.account import Account, call_metrics, warn_of_missing_rewards
from agl_trainer.advantages import next_baseline
from agl_trainer.checkpoint import TrainingState, load_latest, prune, save_adapter, save_checkpoint
from agl_trainer.evaluation import EvalResult, TaskScore
from agl_trainer.grpo import GrpoBatch, RoleState, grpo_batch, zero_variance_groups
from agl_trainer.metrics import MetricsLog
from agl_trainer.progress import Progress
from agl_trainer.runner import Outcome
from agl_trainer.session import Session, load_list, open_session
from agl_trainer.sft import batches, check_examples, sft_loss, sft_rows
from agl_trainer.step import batch_options, role_states, train_batch
from agl_trainer.update import Update, update_role

SFT, GRPO = "sft", "grpo"
_CHECKPOINTS_KEPT = 2

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Standing:
    """Where the training stands: what a checkpoint keeps beside weights."""

    step: int = 0
    phase: str = SFT
    position: int = 0
    phase_step: int = 0
    baselines: dict[str, float] = field(default_factory=dict)
    optimizers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)


@dataclass(slots=True)
class _Sample:
    """What was sampled for a step."""

    outcomes: list[Outcome] = field(default_factory=list)
    trajectories: list[Trajectory] = field(default_factory=list)
    drawn: int = 0
    """Groups."""
    replaced: list[str] = field(default_factory=list)
    """Ids of groups in whose place others were drawn."""
    without_difference: list[str] = field(default_factory=list)
    """Of the groups drawn last, those of which nothing would train."""


class Trainer:
    """Trains the roles of a configuration. Open it as a context manager, or call `fit` for the whole training.

    What a killed or interrupted training has done is taken up again from its last checkpoint in `train.output_dir`.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.train = config.require_train()
        self.folder = Path(self.train.output_dir)
        self.run = self.folder.name
        self._standing = _Standing()
        self._session: Session | None = None

    @classmethod
    def from_config(cls, path: str | Path) -> Self:
        """Raises ConfigError as `Config.load`, also where it has no `train` section."""
        return cls(Config.load(path))

    @contextmanager
    def open(self) -> Iterator[Self]:
        """Start store, engine and gateway, and take up the last checkpoint."""
        if self.train.deterministic:
            torch.use_deterministic_algorithms(True)
        with open_session(self.config) as session, Progress() as progress:
            self._session, self._progress = session, progress
            self._account = Account(session.store)
            self._resume()
            self._metrics = MetricsLog(session.store, self.run, self.folder, first_step=self._standing.step + 1)
            try:
                yield self
            finally:
                self._metrics.close()
                self._session = None

    @property
    def session(self) -> Session:
        if self._session is None:
            raise TrainingError("the trainer is not open; use `with trainer.open():`")
        return self._session

    def fit(self) -> None:
        """Open, run every GRPO step that is left, and close."""
        with self.open():
            self.grpo()

    # --- supervised fine-tuning ---------------------------------------------------------------------------------

    def sft(self) -> None:
        """Every supervised step that is left; none once GRPO has begun."""
        config = self.config.sft
        if config is None:
            raise ConfigError("the configuration has no `sft` section; `agl sft` needs sft.examples")
        if self._standing.phase != SFT:
            return
        given = load_list(config.examples, "sft.examples")
        examples = check_examples(given, self.session.policy.roles, config.examples)
        plan = [
            batch
            for epoch in range(config.epochs)
            for batch in batches(examples, config.batch_size, epoch, self.train.seed)
        ]
        self._enter(SFT, config.learning_rate)
        self._progress.start(SFT, step=self._standing.position, steps=len(plan))
        for number, batch in enumerate(plan[self._standing.position :], start=self._standing.position + 1):
            started = time.monotonic()
            role = batch[0]["role"]
            with self._weights():
                owner, sharing = next(item for item in self.session.policy.adapters.items() if role in item[1])
                update = self._update(owner, sft_rows(self.session.template, batch), sft_loss)
                self._count(1, set(sharing))
            self._log({f"sft/{role}/{name}": value for name, value in update.metrics.items()})
            # An epoch of examples is soon repeated, a checkpoint takes as long as a step.
            if number % (len(plan) // config.epochs) == 0:
                self._save()
            self._progress.update(step=number, tokens_per_s=update.distinct_tokens / (time.monotonic() - started))
        self._publish()

    # --- reinforcement learning ---------------------------------------------------------------------------------

    def grpo(self) -> None:
        """Every GRPO step that is left."""
        tasks = load_list(self.train.tasks, "train.tasks")
        self._enter(GRPO, self.train.learning_rate)
        done = self._standing.phase_step
        self._progress.start(GRPO, step=done, steps=self.train.steps)
        for step in range(done, self.train.steps):
            self._grpo_step(step, tasks)
            self._progress.update(step=step + 1, waiting_for=None)
        self._publish()

    def _grpo_step(self, step: int, tasks: Sequence[Any]) -> None:
        started = time.monotonic()
        options = batch_options(self.config, vocabulary=len(self.session.policy.output_weight))
        roles = role_states(self.config, self.session.policy, step, self._standing.baselines)
        sample = self._sample(step, tasks, roles)
        sampled = time.monotonic()
        batch = grpo_batch(sample.trajectories, roles, options, replaced_groups=frozenset(sample.replaced))
        self._check_calls(batch, sample.outcomes)
        batch.verdicts += self._account.late_calls()
        with self._weights():
            updates = train_batch(self.session.policy, self._standing.optimizers, batch, self.config)
            taken = {owner for owner, update in updates.items() if not update.was_skipped}
            self._count(sample.drawn, {role for owner in taken for role in self.session.policy.adapters[owner]})
        for role, credits in batch.credits.items():
            before = self._standing.baselines.get(role, 0.0)
            self._standing.baselines[role] = next_baseline(before, torch.tensor(credits), self.train.ema_decay)
        unfinished = [outcome.rollout_id for outcome in sample.outcomes if outcome.error is not None]
        self._account.record(self._standing.step, batch.verdicts, unfinished)
        times = {"time/rollouts_s": sampled - started, "time/update_s": time.monotonic() - sampled}
        groups = {"groups": float(sample.drawn), "groups/replaced": float(len(sample.replaced))}
        metrics = (
            _reward_metrics(sample.trajectories, sample.outcomes) | groups | _batch_metrics(batch, updates) | times
        )
        self._log(metrics)
        # Last: a step that is killed before this is repeated, and says again what it did.
        self._save()
        self._progress.update(reward=metrics.get("reward/mean"))

    def _sample(self, step: int, tasks: Sequence[Any], roles: Mapping[str, RoleState]) -> "_Sample":
        """The rollouts of a step. Groups without a difference are replaced, `train.dynamic_sampling` times at most."""
        sample, wanted = _Sample(), self.train.groups_per_step
        for _ in range(1 + self.train.dynamic_sampling):
            rollouts = [
                rollout
                for group in range(sample.drawn, sample.drawn + wanted)
                for rollout in self._group(step, group, self._task_at(tasks, self._standing.position + group))
            ]
            outcomes = self._run(rollouts)
            trajectories = self._trajectories(outcomes)
            sample.replaced += sample.without_difference
            sample.drawn += wanted
            sample.outcomes += outcomes
            sample.trajectories += trajectories
            sample.without_difference = zero_variance_groups(trajectories, roles, batch_options(self.config))
            wanted = len(sample.without_difference)
            if not wanted:
                break
        return sample

    def _group(self, step: int, group: int, task: Any) -> list[Rollout]:
        name = f"{self.run}-{step + 1:05d}-g{group}"
        return [self._rollout(f"{name}-r{i}", task, name, "train") for i in range(self.train.group_size)]

    def _task_at(self, tasks: Sequence[Any], position: int) -> Any:
        """The task at `position` of an endless sequence of epochs."""
        epoch, place = divmod(position, len(tasks))
        if self.train.shuffle:
            place = random.Random(f"{self.train.seed}-{epoch}").sample(range(len(tasks)), len(tasks))[place]
        return tasks[place]

    def _check_calls(self, batch: GrpoBatch, outcomes: Sequence[Outcome]) -> None:
        """Raises TrainingError where agents answered, but no call of theirs is known: training would do nothing."""
        answered = sum(outcome.error is None for outcome in outcomes)
        if answered and not batch.verdicts:
            raise TrainingError(
                f"{answered} of {len(outcomes)} rollouts ended well, but no model call was joined to any of them; name "
                "the framework in train.instrument, or send agl.headers() with each request to OPENAI_BASE_URL"
            )

    # --- evaluation ---------------------------------------------------------------------------------------------

    def evaluate(self, label: str) -> EvalResult:
        """One rollout of each held-out task under the present adapters. A failed rollout counts 0."""
        if self.train.eval_tasks is None:
            raise ConfigError("train.eval_tasks is not set; name a function that returns the held-out tasks")
        tasks = load_list(self.train.eval_tasks, "train.eval_tasks")
        self._progress.start(f"evaluating {label}", steps=len(tasks))
        name = f"{self.run}-eval-{label}"
        rollouts = [self._rollout(f"{name}-{index:04d}", task, None, "eval") for index, task in enumerate(tasks)]
        outcomes = self._run(rollouts, counts_steps=True)
        parts = list(dict.fromkeys(part for outcome in outcomes for part in outcome.parts))
        scores = {
            _task_id(task, index): self._score(outcome, parts)
            for index, (task, outcome) in enumerate(zip(tasks, outcomes, strict=True))
        }
        return EvalResult(label, scores)

    def _score(self, outcome: Outcome, parts: Sequence[str]) -> TaskScore:
        if outcome.error is not None:
            return TaskScore(0.0, dict.fromkeys(parts, 0.0))
        if outcome.reward is not None:
            return TaskScore(outcome.reward, outcome.parts)
        trajectory = build_trajectory(self.session.store.query_spans(outcome.rollout_id))
        if trajectory.reward is None:
            raise TrainingError(
                f"rollout {outcome.rollout_id} ended without a reward; set train.reward or call agl.emit_reward"
            )
        return TaskScore(trajectory.reward)

    # --- shared by the phases -----------------------------------------------------------------------------------

    def _rollout(self, name: str, task: Any, group_id: str | None, mode: str) -> Rollout:
        """A rollout whose id no earlier run has used.

        `~n` marks the repetition of a step that was cut short; the gateway leaves it out of the seeds, so that the
        repetition samples the same.
        """
        known = self.session.store.get_rollout
        free = next(
            candidate
            for repetition in range(10_000)
            if known(candidate := f"{name}~{repetition}" if repetition else name) is None
        )
        return Rollout(free, task, group_id=group_id, mode=mode)

    def _run(self, rollouts: Sequence[Rollout], *, counts_steps: bool = False) -> list[Outcome]:
        engine, started, left = self.session.engine, time.monotonic(), len(rollouts)
        engine.make_live()
        before = engine.tokens_sampled

        def on_done(_: Outcome) -> None:
            nonlocal left
            left -= 1
            after, speed = engine.tokens_sampled, None
            if before is not None and after is not None:
                speed = (after - before) / (time.monotonic() - started)
            done = {"step": len(rollouts) - left} if counts_steps else {}
            self._progress.update(tokens_per_s=speed, waiting_for=f"{left} of {len(rollouts)} rollouts", **done)

        return self.session.runner.run(rollouts, on_done=on_done)

    def _trajectories(self, outcomes: Sequence[Outcome]) -> list[Trajectory]:
        """Those of the rollouts that left any span: an agent that hangs may leave none, and no word of its failure."""
        found = []
        for outcome in outcomes:
            if spans := self.session.store.query_spans(outcome.rollout_id):
                trajectory = build_trajectory(spans)
                found.append(replace(trajectory, error=trajectory.error or outcome.error))
        return found

    def _update(self, role: str, rows: Sequence[Any], loss: Any) -> Update:
        return update_role(
            self.session.policy,
            role,
            self._standing.optimizers[role],
            rows,
            loss,
            pack_tokens=self.train.pack_tokens,
            max_grad_norm=self.train.max_grad_norm,
        )

    @contextmanager
    def _weights(self) -> Iterator[None]:
        """The time in which weights may change: nothing samples."""
        with self.session.engine.paused(), self.session.policy.lock:
            yield

    def _log(self, metrics: Mapping[str, float]) -> None:
        self._metrics.append(self._standing.step, metrics)

    def _enter(self, phase: str, learning_rate: float) -> None:
        """Begin `phase` at its start, or go on in it."""
        # The prompts of an evaluation are forgotten too: a resumed run, which does not repeat it, does not know them.
        with self._weights():
            if self._standing.phase != phase:
                self._standing.phase, self._standing.position, self._standing.phase_step = phase, 0, 0
                self._standing.optimizers = {}
            for role in self.session.policy.adapters:
                if role not in self._standing.optimizers:
                    self._standing.optimizers[role] = self._optimizer(role, learning_rate)

    def _optimizer(self, role: str, learning_rate: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.session.policy.parameters(role), lr=learning_rate, weight_decay=0.0)

    def _count(self, drawn: int, updated: set[str]) -> None:
        """Count a step that drew `drawn` tasks or batches and updated the roles `updated`."""
        self._standing.step += 1
        self._standing.phase_step += 1
        self._standing.position += drawn
        for role in updated:
            self.session.policy.versions[role] += 1

    def _save(self) -> None:
        """Keep the present state as a checkpoint."""
        policy, standing = self.session.policy, self._standing
        checkpoints = self.folder / "checkpoints"
        state = TrainingState(
            step=standing.step,
            phase=standing.phase,
            position=standing.position,
            phase_step=standing.phase_step,
            baselines=standing.baselines,
            versions=dict(policy.versions),
            adapters={role: policy.adapter(role) for role in policy.roles},
            adapter_configs={role: policy.adapter_config(role) for role in policy.roles},
            optimizers={role: optimizer.state_dict() for role, optimizer in standing.optimizers.items()},
            config=self.config.to_yaml(),
        )
        save_checkpoint(checkpoints, state)
        prune(checkpoints, keep=_CHECKPOINTS_KEPT)

    def _publish(self) -> None:
        """Write each role's adapter to `adapters/<role>@<n>` and tell store and engine: what is served."""
        policy = self.session.policy
        for role in policy.roles:
            folder = self.folder / "adapters" / policy.version_name(role)
            save_adapter(folder, policy.adapter(role), policy.adapter_config(role))
            self.session.store.put_resource(Resource(role, policy.versions[role], str(folder.resolve())))
        self.session.engine.make_live()

    def _resume(self) -> None:
        state = load_latest(self.folder / "checkpoints")
        if state is None:
            return
        policy = self.session.policy
        if set(state.adapters) != set(policy.roles):
            raise TrainingError(
                f"the checkpoint in {self.folder} has the roles {', '.join(state.adapters)}, agent_roles has "
                f"{', '.join(policy.roles)}; choose another train.output_dir"
            )
        for role, adapter in state.adapters.items():
            policy.load_adapter(role, adapter, state.versions[role])
        self._standing = _Standing(state.step, state.phase, state.position, state.phase_step, dict(state.baselines))
        for role, optimizer_state in state.optimizers.items():
            optimizer = self._optimizer(role, 0.0)  # its learning rate is part of the state
            optimizer.load_state_dict(optimizer_state)
            self._standing.optimizers[role] = optimizer
        rng.restore(state.rng)


def _task_id(task: Any, index: int) -> str:
    return str(task["id"]) if isinstance(task, dict) and "id" in task else str(index)


def _reward_metrics(trajectories: Sequence[Trajectory], outcomes: Sequence[Outcome]) -> dict[str, float]:
    rewards = [trajectory.reward for trajectory in trajectories if trajectory.reward is not None]
    parts: dict[str, list[float]] = {"mean": rewards} if rewards else {}
    for outcome in outcomes:
        for part, value in outcome.parts.items():
            parts.setdefault(part, []).append(value)
    failed = sum(outcome.error is not None for outcome in outcomes)
    means = {f"reward/{part}": sum(values) / len(values) for part, values in parts.items()}
    return means | {"rollouts": float(len(outcomes)), "rollouts/failed": float(failed)}


def _batch_metrics(batch: GrpoBatch, updates: Mapping[str, Update]) -> dict[str, float]:
    metrics = call_metrics(batch.verdicts)
    metrics["rollouts/without_reward"] = float(warn_of_missing_rewards(batch.verdicts))
    for role, credits in batch.credits.items():
        metrics[f"{role}/credit_mean"] = statistics.fmean(credits)
        metrics[f"{role}/credit_std"] = statistics.pstdev(credits)
    for role, update in updates.items():
        metrics |= {f"{role}/{name}": value for name, value in update.metrics.items()}
    metrics["tokens/distinct"] = float(sum(update.distinct_tokens for update in updates.values()))
    metrics["tokens/total"] = float(sum(update.total_tokens for update in updates.values()))
    return metrics
