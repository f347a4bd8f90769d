"""The GRPO phase: draw rollouts, build the batch, take the optimizer steps, evaluate, save."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from agl.cli.terminal import counted
from agl.errors import ConfigError, NothingTrainedError
from agl.rewards.judge import Judge
from agl_trainer.algo.advantages import next_baseline
from agl_trainer.algo.options import BatchOptions, RoleState
from agl_trainer.compute.optimizer_step import StepStats
from agl_trainer.compute.train_batch import role_states, train_batch
from agl_trainer.loop.call_log import (
    call_metrics,
    rollouts_without_reward,
    warn_of_missing_rewards,
    warn_of_shared_seeds,
    warn_of_unused_weights,
)
from agl_trainer.loop.evaluation import evaluate_step, load_best, prune_best
from agl_trainer.loop.recorded_logprobs import recorded_logprobs_mode
from agl_trainer.loop.schedule import learning_rate
from agl_trainer.loop.state import GRPO
from agl_trainer.loop.step_rollouts import StepRollouts, draw_rollouts
from agl_trainer.loop.training import Training
from agl_trainer.report.reward_warnings import RewardWatch
from agl_trainer.report.step_metrics import Stopwatch, answer_metrics, batch_metrics, reward_metrics, update_metrics
from agl_trainer.rollout.judged_source import JudgedSource
from agl_trainer.rollout.sources import AgentSource, AsyncAgentSource, RolloutSource, StoreSource, TaskStream
from agl_trainer.rollout.task_list import load_list
from agl_trainer.rollout.traces import StoredGroup, stored_groups


def run_grpo(training: Training, *, from_store: bool = False) -> None:
    """All remaining steps, on new rollouts or on those of the store, unless `train.early_stop` ends them."""
    train = training.train
    if from_store and train.eval_every:
        raise ConfigError("train.eval_every needs an engine; leave it out to train from the store, and `agl eval`")
    if from_store and train.algorithm == "grpo" and (limits := train.sampling.settings()):
        raise ConfigError(
            f"train.sampling.{next(iter(limits))} keeps the likeliest tokens of the policy that sampled, which is not "
            "known for rollouts of the store; leave it out"
        )
    engine = training.session.serving.engine if training.session.serving and not from_store else None
    groups = stored_groups(training.store, train.traces) if from_store else []
    options = BatchOptions.of(
        training.config,
        logprobs_mode=recorded_logprobs_mode(train, engine),
        from_store=from_store,
        represented=statistics.fmean(group.represented for group in groups) if groups else 1.0,
    )
    training.enter(GRPO)
    training.state.keep_references(training.policies, train)
    done = training.state.phase_step
    watch = RewardWatch.of(training.store.query_metrics(training.run))
    if done >= train.steps:
        training.progress.note(f"{train.algorithm}: all {train.steps} steps are done; more need a higher train.steps")
    with (
        _open_source(training, groups) as source,
        training.progress.phase(train.algorithm, step=done, steps=train.steps),
    ):
        if train.eval_every and done == 0:
            evaluate_step(training)
        for step in range(done, train.steps):
            best, empty = training.state.best, training.state.empty_steps
            if step > done and train.stop_after_empty_steps and empty >= train.stop_after_empty_steps:
                break
            if train.early_stop and best and best.waited >= train.early_stop:
                number = best.step - training.state.step + step
                training.progress.note(
                    f"train.early_stop: no better evaluation than that of step {number} in the last {best.waited}"
                )
                break
            _GrpoStep(training, step, options, watch).run(source)
            training.progress.update(step=step + 1, waiting_for=None)
    if training.state.best is not None and training.state.best.step != training.state.step:
        load_best(training)
    training.publish()
    _check_trained(training)


def _check_trained(training: Training) -> None:
    """Raises NothingTrainedError if no call trained in the phase, or in so many of its last steps that it stopped."""
    train, state = training.train, training.state
    if state.empty_steps == state.phase_step > 0:
        raise NothingTrainedError(
            f"no call trained in the {counted(state.phase_step, 'step')} of {training.folder}. "
            "`calls/dropped` in metrics.jsonl counts the reasons; `agl rollouts` and `agl inspect` show the rollouts"
        )
    if train.stop_after_empty_steps and state.empty_steps >= train.stop_after_empty_steps:
        raise NothingTrainedError(
            f"stopped at step {state.phase_step}: no call trained in the last {state.empty_steps} steps "
            "(train.stop_after_empty_steps). What earlier steps trained is published"
        )


@dataclass(frozen=True, slots=True)
class _GrpoStep:
    training: Training
    number: int
    """Steps of the phase before this one."""
    options: BatchOptions
    watch: RewardWatch

    def run(self, source: RolloutSource) -> None:
        training, state = self.training, self.training.state
        clock, tokens_before = Stopwatch(), training.tokens_sampled()
        roles = role_states(training.config, training.policies, self.number, state.baselines)
        rollouts = self._draw(source, roles, clock)
        warn_of_shared_seeds(rollouts.trajectories)
        by_default = self.options.reward_weights if self.options.loss.advantage == "gdpo" else {}
        warn_of_unused_weights(
            rollouts.trajectories, {name: role.weights or by_default for name, role in roles.items()}
        )
        state.open_groups = source.prefetch(self.number)
        clock.lap("rollouts")
        rate = learning_rate(training.train, training.train.learning_rate, self.number, training.train.steps)
        stats = self._train(rollouts, rate)
        clock.lap("update")
        outcomes, trained = rollouts.batch.outcomes, rollouts.count_trained()
        # A policy that has learned its tasks, or a step of few groups, earns alike: no reason to stop what has trained.
        has_trained = state.empty_steps < self.number
        state.empty_steps = 0 if trained or (has_trained and rollouts.earned_alike()) else state.empty_steps + 1
        if not trained:
            training.progress.note(f"step {state.phase_step}: {rollouts.why_none_trained()}")
        training.call_log.record(state.step, outcomes, rollouts.unfinished)
        metrics = rollouts.metrics() | reward_metrics(rollouts.trajectories) | call_metrics(outcomes)
        metrics |= answer_metrics(rollouts.trajectories)
        warn_of_missing_rewards(missing := rollouts_without_reward(outcomes), "their groups")
        metrics["rollouts/without_reward"] = float(len(missing))
        metrics |= batch_metrics(rollouts.batch, roles) | update_metrics(stats, clock.laps["update"])
        metrics["learning_rate"] = rate
        if tokens_before is not None:
            sampled = (training.tokens_sampled() or 0) - tokens_before
            metrics["tokens/sampled_per_s"] = sampled / clock.laps["rollouts"]
        self._finish(metrics, clock)
        training.progress.update(reward=metrics.get("reward/mean"), trained=f"{trained}/{len(outcomes)}")

    def _draw(self, source: RolloutSource, roles: Mapping[str, RoleState], clock: Stopwatch) -> StepRollouts:
        training = self.training
        rollouts = draw_rollouts(
            source,
            self.number,
            training.state.position,
            training.train.groups_per_step,
            replacements=training.train.dynamic_sampling,
            roles=roles,
            options=self.options,
            clock=clock,
            failed_reward=training.train.failed_reward,
        )
        if failures := rollouts.many_failures():
            training.progress.note(failures)
        if missing := rollouts.describe_missing():
            training.progress.note(missing)
        rollouts.check_calls()
        rollouts.batch.outcomes += training.call_log.late_calls()
        training.call_log.warn_of_late_rewards()
        clock.lap("batch")
        return rollouts

    def _train(self, rollouts: StepRollouts, rate: float) -> dict[str, StepStats]:
        """Take the optimizer steps, and count them; returns their statistics by adapter."""
        training, state = self.training, self.training.state
        policies, stats = training.policies, dict[str, StepStats]()
        state.set_learning_rate(rate)
        with training.weights_locked():
            for policy in policies:
                stats |= train_batch(policy, state.optimizers, rollouts.batch, training.config, state.references)
            updated = {owner for owner, step in stats.items() if not step.was_skipped}
            sharing = policies.adapters
            state.count_step(policies, rollouts.groups, {role for owner in updated for role in sharing[owner]})
        for role, credits in rollouts.batch.credits.items():
            baseline, weight = state.baselines.get(role, 0.0), state.baseline_weights.get(role, 0.0)
            state.baselines[role], state.baseline_weights[role] = next_baseline(
                baseline,
                weight,
                torch.tensor(credits),
                training.train.ema_decay,
                torch.tensor(rollouts.batch.represented[role]),
            )
        return stats

    def _finish(self, metrics: dict[str, float], clock: Stopwatch) -> None:
        """Evaluate if it is due, log `metrics`, and save the state."""
        training, train, best = self.training, self.training.train, self.training.state.best
        if train.eval_every and (self.number + 1) % train.eval_every == 0:
            result = evaluate_step(training)
            metrics["eval/reward/mean"] = result.mean()
            metrics |= {f"eval/reward/{part}": result.mean(part) for part in result.parts}
            metrics |= {f"eval/{role}/same_answer": answers.share for role, answers in result.answers.items()}
            clock.lap("eval")
        training.log(metrics | clock.metrics())
        for line in self.watch.add(metrics):
            training.progress.note(line)
        # Last: a step that is killed before this is repeated, and logs its metrics again.
        training.save()
        if training.state.best not in (None, best):
            prune_best(training)


@contextmanager
def _open_source(training: Training, groups: Sequence[StoredGroup]) -> Iterator[RolloutSource]:
    """`groups`: of the store, to train on; empty: agents run."""
    with _open_unjudged_source(training, groups) as source:
        config = training.config.judge
        if config is None:
            yield source
        else:
            judge = Judge(config, training.train.seed)
            yield JudgedSource(source, judge, training.store, config.roles, training.config.rewards)


@contextmanager
def _open_unjudged_source(training: Training, groups: Sequence[StoredGroup]) -> Iterator[RolloutSource]:
    train = training.train
    if groups:
        yield StoreSource(training.store, TaskStream.of(groups, train))
        return
    tasks = TaskStream.of(load_list(train.tasks, "train.tasks"), train)
    training.count_items("train.tasks", len(tasks.items))
    agents = AgentSource(training.rollouts, tasks, training.run, train.group_size, train.seed)
    if not train.asynchronous:
        yield agents
        return
    steps_left = train.steps - training.state.phase_step
    state = training.state
    with AsyncAgentSource.open(agents, train, state.position, steps_left, state.open_groups) as ahead:
        yield ahead
