"""The supervised phase: steps on examples, or on rollouts of the store."""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

from agl.config import SftConfig
from agl.errors import ConfigError, TrainingError
from agl.trajectory import DropReason
from agl_trainer.algo.batch import CallOutcome
from agl_trainer.algo.sft_loss import sft_loss
from agl_trainer.compute.optimizer_step import StepStats, optimizer_step
from agl_trainer.data.chat import ChatTemplate
from agl_trainer.data.sft_examples import (
    SftExample,
    TraceLimits,
    check_examples,
    epoch_batches,
    examples_from_config,
    examples_from_traces,
    sft_rows,
)
from agl_trainer.loop.call_log import call_metrics
from agl_trainer.loop.schedule import learning_rate
from agl_trainer.loop.state import SFT
from agl_trainer.loop.training import Training
from agl_trainer.rollout.task_list import load_list
from agl_trainer.rollout.traces import read_traces


def run_sft(training: Training) -> bool:
    """All remaining supervised steps; none, and False, once GRPO has begun.

    Raises ConfigError without a section `sft`.
    """
    config = training.config.sft
    if config is None:
        raise ConfigError("the configuration has no `sft` section; `agl sft` needs sft.examples or sft.traces")
    if training.state.phase != SFT:
        training.progress.note(
            f"sft: takes no step, because GRPO has begun in {training.folder} (step {training.state.step}); to "
            "fine-tune first, choose another train.output_dir"
        )
        return False
    SftPhase(training, config).run()
    return True


@dataclass(frozen=True, slots=True)
class SftPhase:
    training: Training
    config: SftConfig

    def run(self) -> None:
        training, config = self.training, self.config
        examples, dropped = self._examples()
        plan: list[list[SftExample]] = []
        for epoch in range(config.epochs):
            plan += epoch_batches(examples, config.batch_size, epoch, training.train.seed)
        training.enter(SFT)
        training.count_items("sft.examples" if config.examples else "sft.traces", len(examples))
        ends = itertools.accumulate(len(batch) for batch in plan)
        done = sum(end <= training.state.position for end in ends)
        if done == len(plan):
            training.progress.note(f"sft: all {config.epochs} epochs are done; more need a higher sft.epochs")
        with training.progress.phase(SFT, step=done, steps=len(plan)):
            for number, batch in enumerate(plan[done:], start=done + 1):
                started = time.monotonic()
                rate = learning_rate(training.train, config.learning_rate, number - 1, len(plan))
                stats = self._step(batch, dropped if number == 1 else [], rate)
                # Once per epoch: a checkpoint takes as long as a step, and an epoch is soon repeated.
                if number % (len(plan) // config.epochs) == 0:
                    training.save()
                speed = stats.distinct_tokens / (time.monotonic() - started)
                training.progress.update(step=number, loss=stats.metrics["loss"], tokens_per_s=speed)
        training.publish()

    def _examples(self) -> tuple[list[SftExample], list[CallOutcome]]:
        """The examples, and the outcomes of the calls of the store that are in none of them."""
        training, config = self.training, self.config
        if config.traces is None:
            given = load_list(config.examples, "sft.examples")
            valid = check_examples(given, training.policies.roles, config.examples or "")
            templates = {role: ChatTemplate(training.policies.of(role).tokenizer) for role in training.policies.roles}
            return examples_from_config(templates, valid), []
        roles = training.config.agent_roles
        limits = {
            role: TraceLimits(base.engine.max_model_len, len(policy.output_weight), roles.owner_of(role).frozen)
            for base, policy in zip(training.config.bases(), training.policies, strict=True)
            for role in policy.roles
        }
        examples, dropped = examples_from_traces(read_traces(training.store, config.traces), config.traces, limits)
        if not examples:
            raise TrainingError(
                f"none of the {len(dropped)} calls in {training.store.uri} matches sft.traces; check its modes, tags, "
                "roles and min_reward"
            )
        return examples, [CallOutcome(call, None, reason) for call, reason in dropped]

    def _step(self, batch: Sequence[SftExample], dropped: Sequence[CallOutcome], rate: float) -> StepStats:
        training, role, rows = self.training, batch[0].role, sft_rows(batch)
        training.state.set_learning_rate(rate)
        with training.weights_locked():
            policy = training.policies.of(role)
            owner, sharing = next(item for item in policy.adapters.items() if role in item[1])
            stats = optimizer_step(
                policy,
                owner,
                training.state.optimizers[owner],
                rows,
                sft_loss,
                pack_tokens=training.train.pack_tokens,
                max_grad_norm=training.train.max_grad_norm,
            )
            training.state.count_step(training.policies, len(batch), set() if stats.was_skipped else set(sharing))
        metrics = {f"sft/{role}/{name}": value for name, value in stats.metrics.items()}
        metrics["sft/learning_rate"] = rate
        if self.config.traces is not None:
            calls = [(call, row.weight) for example, row in zip(batch, rows, strict=True) for call in example.calls]
            skipped = DropReason.SKIPPED_STEP if stats.was_skipped else None
            outcomes = [CallOutcome(c, None, skipped) if skipped else CallOutcome(c, 1.0, weight=w) for c, w in calls]
            outcomes += dropped
            training.call_log.record(training.state.step, outcomes)
            metrics |= call_metrics(outcomes)
        training.log(metrics)
        return stats
