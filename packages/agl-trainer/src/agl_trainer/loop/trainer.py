"""The training of a configuration: supervised steps, GRPO steps, evaluations, and a checkpoint after every step."""

import logging
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from agl.config import Config, SftConfig
from agl.errors import ConfigError, TrainingError
from agl.store import Resource
from agl.trajectory import DropReason, Trajectory, build_trajectory
from agl_trainer.algo.advantages import next_baseline
from agl_trainer.algo.batch import CallOutcome, GrpoBatch
from agl_trainer.algo.batch_builder import grpo_batch
from agl_trainer.algo.options import BatchOptions, RoleState
from agl_trainer.algo.sft_loss import sft_loss
from agl_trainer.compute.optimizer_step import StepStats, optimizer_step
from agl_trainer.compute.train_batch import role_states, train_batch
from agl_trainer.data.sft_examples import (
    SftExample,
    TraceLimits,
    check_examples,
    epoch_batches,
    examples_from_config,
    examples_from_traces,
    sft_rows,
)
from agl_trainer.loop import rng
from agl_trainer.loop.account import Account, call_metrics, warn_of_missing_rewards
from agl_trainer.loop.best import Best, next_best
from agl_trainer.loop.checkpoint import (
    TrainingState,
    checkpoint_of,
    keep_only,
    load_checkpoint,
    load_latest,
    prune,
    save_checkpoint,
)
from agl_trainer.loop.session import Session, load_list, open_session, open_store_session
from agl_trainer.model.adapter_files import save_adapter
from agl_trainer.report.evaluation import EvalResult, TaskScore
from agl_trainer.report.metrics import MetricsLog
from agl_trainer.report.progress import Progress
from agl_trainer.report.scoring import Sampling, rollout_score, task_score
from agl_trainer.report.step_metrics import Stopwatch, batch_metrics, reward_metrics, update_metrics
from agl_trainer.report.trackers import open_trackers
from agl_trainer.rollout.judge import Judge
from agl_trainer.rollout.judged_source import JudgedSource
from agl_trainer.rollout.rollouts import Rollouts
from agl_trainer.rollout.runner import Outcome
from agl_trainer.rollout.sources import AgentSource, AsyncAgentSource, RolloutSource, StoreSource, TaskStream
from agl_trainer.rollout.traces import read_traces, stored_groups

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
    best: Best | None = None
    optimizers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)


@dataclass(slots=True)
class _Sample:
    """What a step trains on."""

    outcomes: list[Outcome] = field(default_factory=list)
    trajectories: list[Trajectory] = field(default_factory=list)
    drawn: int = 0
    """Groups."""
    replaced: list[str] = field(default_factory=list)
    """Ids of groups in whose place others were drawn."""
    without_difference: list[str] = field(default_factory=list)
    """Of the groups drawn last, those of which nothing would train."""
    of_source: dict[str, list[float]] = field(default_factory=dict)
    """Metrics of the source, for each time that it was drawn from."""

    def metrics(self) -> dict[str, float]:
        failed = [outcome.error for outcome in self.outcomes] or [made.error for made in self.trajectories]
        return {
            "rollouts": float(len(failed)),
            "rollouts/failed": float(sum(error is not None for error in failed)),
            "groups": float(self.drawn),
            "groups/replaced": float(len(self.replaced)),
            "groups/zero_variance": float(len(self.replaced) + len(self.without_difference)),
        } | {
            name: statistics.fmean(values) if name == "judge/disagreement" else sum(values)
            for name, values in self.of_source.items()
        }


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
        self._opened_rollouts: Rollouts | None = None
        self._metrics: MetricsLog | None = None

    @classmethod
    def from_config(cls, path: str | Path) -> Self:
        """Raises ConfigError as `Config.load`, also where it has no `train` section."""
        return cls(Config.load(path))

    @contextmanager
    def open(self, *, samples: bool = True, resumes: bool = True) -> Iterator[Self]:
        """Start store, engine and gateway, and take up the last checkpoint.

        Without `samples` there is no engine: it trains on what the store holds, or on examples. Without `resumes` the
        adapters are fresh: the policy is the base model.
        """
        if self.train.deterministic:
            torch.use_deterministic_algorithms(True)
        opened = open_session(self.config) if samples else open_store_session(self.config)
        with opened as session, Progress() as progress:
            self._session, self._progress = session, progress
            self._account = Account(session.store, self.run)
            self._opened_rollouts = None
            if session.serving is not None:
                retries = self.train.engine_retries
                self._opened_rollouts = Rollouts(session.store, session.serving, progress, retries)
            if resumes:
                self._resume()
            try:
                yield self
            finally:
                if self._metrics is not None:
                    self._metrics.close()
                self._metrics = self._session = None

    @property
    def session(self) -> Session:
        if self._session is None:
            raise TrainingError("the trainer is not open; use `with trainer.open():`")
        return self._session

    @property
    def _rollouts(self) -> Rollouts:
        if self._opened_rollouts is None:
            raise TrainingError("the trainer was opened without an engine; use `with trainer.open():`")
        return self._opened_rollouts

    def fit(self, *, from_store: bool = False) -> None:
        """Open, take every step that is left, and close. `from_store`: on rollouts that the store holds already."""
        with self.open(samples=not from_store):
            self.grpo(from_store=from_store)

    # --- supervised fine-tuning ---------------------------------------------------------------------------------

    def sft(self) -> None:
        """Every supervised step that is left; none once GRPO has begun."""
        config = self.config.sft
        if config is None:
            raise ConfigError("the configuration has no `sft` section; `agl sft` needs sft.examples or sft.traces")
        if self._standing.phase != SFT:
            return
        lessons, dropped = self._lessons(config)
        plan = [
            batch
            for epoch in range(config.epochs)
            for batch in epoch_batches(lessons, config.batch_size, epoch, self.train.seed)
        ]
        self._enter(SFT, config.learning_rate)
        self._progress.start(SFT, step=self._standing.position, steps=len(plan))
        for number, batch in enumerate(plan[self._standing.position :], start=self._standing.position + 1):
            started = time.monotonic()
            update = self._sft_step(batch, dropped if number == 1 else [], counts_calls=config.traces is not None)
            # An epoch of examples is soon repeated, a checkpoint takes as long as a step.
            if number % (len(plan) // config.epochs) == 0:
                self._save()
            self._progress.update(step=number, tokens_per_s=update.distinct_tokens / (time.monotonic() - started))
        self._publish()

    def _lessons(self, config: SftConfig) -> tuple[list[SftExample], list[CallOutcome]]:
        """What is learnt from, and the calls of the store that are not."""
        if config.traces is None:
            given = load_list(config.examples, "sft.examples")
            examples = check_examples(given, self.session.policy.roles, config.examples or "")
            return examples_from_config(self.session.template, examples), []
        vocabulary = len(self.session.policy.output_weight)
        limits = TraceLimits(self.config.agent_roles.roles, self.config.engine.max_model_len, vocabulary)
        lessons, dropped = examples_from_traces(read_traces(self.session.store, config.traces), config.traces, limits)
        if not lessons:
            raise TrainingError(
                f"no call in {self.session.store.uri} is what sft.traces asks for; {len(dropped)} were looked at"
            )
        return lessons, [CallOutcome(call, None, reason) for call, reason in dropped]

    def _sft_step(
        self, batch: Sequence[SftExample], dropped: Sequence[CallOutcome], *, counts_calls: bool
    ) -> StepStats:
        role, rows = batch[0].role, sft_rows(batch)
        with self._weights():
            owner, sharing = next(item for item in self.session.policy.adapters.items() if role in item[1])
            update = self._update(owner, rows, sft_loss)
            self._count(1, set() if update.was_skipped else set(sharing))
        metrics = {f"sft/{role}/{name}": value for name, value in update.metrics.items()}
        if counts_calls:
            calls = [(call, row.weight) for lesson, row in zip(batch, rows, strict=True) for call in lesson.calls]
            skipped = DropReason.SKIPPED_STEP if update.was_skipped else None
            verdicts = [CallOutcome(c, None, skipped) if skipped else CallOutcome(c, 1.0, weight=w) for c, w in calls]
            verdicts += dropped
            self._account.record(self._standing.step, verdicts)
            metrics |= call_metrics(verdicts)
        self._log(metrics)
        return update

    # --- reinforcement learning ---------------------------------------------------------------------------------

    def grpo(self, *, from_store: bool = False) -> None:
        """Every step that is left, on new rollouts or on those of the store; fewer where `early_stop` ends them."""
        if from_store and self.train.eval_every:
            raise ConfigError("train.eval_every needs an engine; leave it out to train from the store, and `agl eval`")
        self._enter(GRPO, self.train.learning_rate)
        done = self._standing.phase_step
        with self._source(from_store=from_store) as source:
            if self.train.eval_every and done == 0:
                self._keep_if_best(self._held_out())
            self._progress.start(self.train.algorithm, step=done, steps=self.train.steps)
            for step in range(done, self.train.steps):
                if self._is_over():
                    self._progress.note(f"no better than step {self._best().step} for long: train.early_stop")
                    break
                self._grpo_step(step, source)
                self._progress.update(step=step + 1, waiting_for=None)
        self._publish()

    def _grpo_step(self, step: int, source: RolloutSource) -> None:
        clock, tokens_before = Stopwatch(), self._tokens_sampled()
        roles = role_states(self.config, self.session.policy, step, self._standing.baselines)
        sample = self._sample(step, source, roles)
        source.prefetch(step)
        clock.lap("rollouts")
        batch = self._batch(sample, roles)
        clock.lap("batch")
        updates = self._train(batch, sample.drawn)
        clock.lap("update")
        unfinished = [outcome.rollout_id for outcome in sample.outcomes if outcome.error is not None]
        self._account.record(self._standing.step, batch.outcomes, unfinished)
        metrics = sample.metrics() | reward_metrics(sample.trajectories) | call_metrics(batch.outcomes)
        metrics["rollouts/without_reward"] = float(warn_of_missing_rewards(batch.outcomes))
        metrics |= batch_metrics(batch, roles) | update_metrics(updates, clock.laps["update"])
        if tokens_before is not None:
            sampled = (self._tokens_sampled() or 0) - tokens_before
            metrics["tokens/sampled_per_s"] = sampled / clock.laps["rollouts"]
        best = self._standing.best
        if self.train.eval_every and (step + 1) % self.train.eval_every == 0:
            metrics |= self._evaluate_step(step)
            clock.lap("eval")
        self._log(metrics | clock.metrics())
        # Last: a step that is killed before this is repeated, and says again what it did.
        self._save()
        if self._standing.best is not None and self._standing.best != best:
            keep_only(self._best_folder, self._standing.best.step)
        self._progress.update(reward=metrics.get("reward/mean"))

    def _batch(self, sample: "_Sample", roles: Mapping[str, RoleState]) -> GrpoBatch:
        options = BatchOptions.of(self.config, vocabulary_size=len(self.session.policy.output_weight))
        batch = grpo_batch(sample.trajectories, roles, options, replaced_groups=frozenset(sample.replaced))
        self._check_calls(batch, sample.outcomes)
        batch.outcomes += self._account.late_calls()
        return batch

    def _train(self, batch: GrpoBatch, drawn: int) -> dict[str, StepStats]:
        """Take the optimizer steps of `batch`, of which `drawn` groups were drawn, and count them."""
        policy, standing = self.session.policy, self._standing
        with self._weights():
            updates = train_batch(policy, standing.optimizers, batch, self.config)
            taken = {owner for owner, update in updates.items() if not update.was_skipped}
            self._count(drawn, {role for owner in taken for role in policy.adapters[owner]})
        for role, credits in batch.credits.items():
            baseline = standing.baselines.get(role, 0.0)
            standing.baselines[role] = next_baseline(baseline, torch.tensor(credits), self.train.ema_decay)
        return updates

    def _sample(self, step: int, source: RolloutSource, roles: Mapping[str, RoleState]) -> "_Sample":
        """The rollouts of a step. Groups without a difference are replaced, `train.dynamic_sampling` times at most."""
        sample, wanted = _Sample(), self.train.groups_per_step
        for _ in range(1 + self.train.dynamic_sampling):
            drawn = source.draw(step, self._standing.position, range(sample.drawn, sample.drawn + wanted))
            sample.replaced += sample.without_difference
            sample.drawn += wanted
            for name, value in drawn.metrics.items():
                sample.of_source.setdefault(name, []).append(value)
            sample.outcomes += drawn.outcomes
            sample.trajectories += drawn.trajectories
            sample.without_difference = grpo_batch(
                drawn.trajectories, roles, BatchOptions.of(self.config)
            ).zero_variance_groups
            wanted = len(sample.without_difference)
            if not wanted:
                break
        return sample

    @contextmanager
    def _source(self, *, from_store: bool) -> Iterator[RolloutSource]:
        with self._unjudged(from_store=from_store) as source:
            judge, weights = self.config.judge, self.config.rewards
            if judge is None:
                yield source
            else:
                asked = Judge(judge, self.train.seed)
                yield JudgedSource(source, asked, self.session.store, judge.roles, weights)

    @contextmanager
    def _unjudged(self, *, from_store: bool) -> Iterator[RolloutSource]:
        if from_store:
            stored = stored_groups(self.session.store, self.train.traces)
            yield StoreSource(self.session.store, TaskStream.of(stored, self.train))
            return
        tasks = TaskStream.of(load_list(self.train.tasks, "train.tasks"), self.train)
        agents = AgentSource(self._rollouts, tasks, self.run, self.train.group_size)
        if not self.train.asynchronous:
            yield agents
            return
        left = self.train.steps - self._standing.phase_step
        with AsyncAgentSource.open(agents, self.train, self._standing.position, left) as ahead:
            yield ahead

    def _check_calls(self, batch: GrpoBatch, outcomes: Sequence[Outcome]) -> None:
        """Raises TrainingError where agents answered, but no call of theirs is known: training would do nothing."""
        answered = sum(outcome.error is None for outcome in outcomes)
        if answered and not batch.outcomes:
            raise TrainingError(
                f"{answered} of {len(outcomes)} rollouts ended well, but no model call was joined to any of them; name "
                "the framework in train.instrument, or send agl.headers() with each request to OPENAI_BASE_URL"
            )

    # --- evaluation ---------------------------------------------------------------------------------------------

    def evaluate(self, label: str, sampling: Sampling | None = None) -> EvalResult:
        """Rollouts of each held-out task under the present adapters, one or more. A failed rollout counts 0."""
        if self.train.eval_tasks is None:
            raise ConfigError("train.eval_tasks is not set; name a function that returns the held-out tasks")
        sampling = sampling or Sampling()
        sampling.check(self.train.eval_temperature)
        tasks = load_list(self.train.eval_tasks, "train.eval_tasks")
        name = f"{self.run}-eval-{label}"
        rollouts = [
            self._rollouts.make(f"{name}-{index:04d}" + (f"-s{sample}" if sample else ""), task, None, "eval")
            for index, task in enumerate(tasks)
            for sample in range(sampling.samples)
        ]
        self._progress.start(f"evaluating {label}", steps=len(rollouts))
        self._rollouts.make_live()
        outcomes = self._rollouts.run(rollouts, counts_steps=True)[: len(rollouts)]
        scores = [self._score(outcome) for outcome in outcomes]
        parts = list(dict.fromkeys(part for score in scores if score for part in score.parts))
        size = sampling.samples
        made = {
            _task_id(task, index): task_score(scores[index * size : (index + 1) * size], parts, sampling)
            for index, task in enumerate(tasks)
        }
        return EvalResult(label, made)

    def take_best(self) -> None:
        """Take up the adapters of the best evaluation. Raises TrainingError where none was kept."""
        best = self._best()
        state = load_checkpoint(checkpoint_of(self._best_folder, best.step))
        with self._weights():
            for role, adapter in state.adapters.items():
                self.session.policy.load_adapter(role, adapter, state.versions[role])

    def _score(self, outcome: Outcome) -> TaskScore | None:
        spans = self.session.store.query_spans(outcome.rollout_id)
        return rollout_score(outcome, build_trajectory(spans) if spans else None)

    def _evaluate_step(self, step: int) -> dict[str, float]:
        result = self._held_out()
        self._keep_if_best(result)
        self._progress.start(self.train.algorithm, step=step, steps=self.train.steps)
        return {"eval/reward/mean": result.mean()} | {f"eval/reward/{part}": result.mean(part) for part in result.parts}

    def _held_out(self) -> EvalResult:
        """The evaluation of the present step."""
        result = self.evaluate(f"step-{self._standing.step:05d}")
        result.save(self.folder / "eval" / f"{result.label}.json")
        with self._weights():
            pass  # The engine forgets the prompts: a run that is resumed later does not know them.
        return result

    def _keep_if_best(self, result: EvalResult) -> None:
        """Keep the adapters beside the checkpoints where they do better on the held-out tasks than all before."""
        self._standing.best = next_best(self._standing.best, self._standing.step, result.mean())
        if self._standing.best.waited == 0:
            save_checkpoint(self._best_folder, self._state())

    def _best(self) -> Best:
        if self._standing.best is None:
            raise TrainingError(f"no evaluation of {self.folder} was kept; set train.eval_every")
        return self._standing.best

    def _is_over(self) -> bool:
        best = self._standing.best
        return bool(self.train.early_stop and best and best.waited >= self.train.early_stop)

    @property
    def _best_folder(self) -> Path:
        return self.folder / "best"

    # --- shared by the phases -----------------------------------------------------------------------------------

    def _tokens_sampled(self) -> int | None:
        """By the engine since it was opened; None where there is none, or it does not tell."""
        serving = self.session.serving
        return serving.engine.tokens_sampled if serving else None

    def _update(self, role: str, rows: Sequence[Any], loss: Any) -> StepStats:
        return optimizer_step(
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
        serving = self.session.serving
        with serving.engine.paused() if serving else nullcontext(), self.session.policy.lock:
            yield

    def _log(self, metrics: Mapping[str, float]) -> None:
        if self._metrics is None:  # an evaluation alone is no run to anybody who watches
            first = self._standing.step
            config = self.config.model_dump(mode="json", exclude_none=True)
            trackers = open_trackers(self.train.report_to, self.run, self.folder, config, first)
            self._metrics = MetricsLog(self.session.store, self.run, self.folder, first_step=first, trackers=trackers)
        self._metrics.append(self._standing.step, metrics)

    def _enter(self, phase: str, learning_rate: float) -> None:
        """Begin `phase` at its start, or go on in it."""
        # The prompts of an evaluation are forgotten too: a resumed run, which does not repeat it, does not know them.
        with self._weights():
            if self._standing.phase != phase:
                self._standing = _Standing(self._standing.step, phase, baselines=self._standing.baselines)
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
        checkpoints = self.folder / "checkpoints"
        save_checkpoint(checkpoints, self._state())
        prune(checkpoints, keep=_CHECKPOINTS_KEPT)

    def _state(self) -> TrainingState:
        policy, standing = self.session.policy, self._standing
        return TrainingState(
            step=standing.step,
            phase=standing.phase,
            position=standing.position,
            phase_step=standing.phase_step,
            baselines=standing.baselines,
            best=asdict(standing.best) if standing.best else None,
            versions=dict(policy.versions),
            adapters={role: policy.adapter(role) for role in policy.roles},
            adapter_configs={role: policy.adapter_config(role) for role in policy.roles},
            optimizers={role: optimizer.state_dict() for role, optimizer in standing.optimizers.items()},
            config=self.config.to_yaml(),
        )

    def _publish(self) -> None:
        """Write each role's adapter to `adapters/<role>@<n>` and tell store and engine: what is served.

        Where evaluations were kept these are the best ones, not the last.
        """
        if self._standing.best is not None and self._standing.best.step != self._standing.step:
            self.take_best()
        policy = self.session.policy
        for role in policy.roles:
            folder = self.folder / "adapters" / policy.version_name(role)
            save_adapter(folder, policy.adapter(role), policy.adapter_config(role))
            self.session.store.put_resource(Resource(role, policy.versions[role], str(folder.resolve())))
        if self.session.serving is not None:
            self.session.serving.engine.make_live()

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
        self._standing = _Standing(
            state.step, state.phase, state.position, state.phase_step, dict(state.baselines), Best.of(state.best)
        )
        for role, optimizer_state in state.optimizers.items():
            optimizer = self._optimizer(role, 0.0)  # its learning rate is part of the state
            optimizer.load_state_dict(optimizer_state)
            self._standing.optimizers[role] = optimizer
        rng.restore(state.rng)


def _task_id(task: Any, index: int) -> str:
    return str(task["id"]) if isinstance(task, dict) and "id" in task else str(index)
