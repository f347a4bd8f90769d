"""Evaluations on the held-out tasks, and the adapters of the best one."""

from pathlib import Path

from agl.errors import ConfigError, TrainingError
from agl.inspection.evaluation import evaluation_record
from agl.seeds import derive
from agl.trajectory import build_trajectory
from agl_trainer.loop.call_log import warn_of_missing_rewards
from agl_trainer.loop.checkpoint import checkpoint_folder, keep_only, load_checkpoint, save_checkpoint
from agl_trainer.loop.state import Best, next_best
from agl_trainer.loop.training import Training
from agl_trainer.report.evaluation import EvalResult
from agl_trainer.report.scoring import (
    Sampling,
    commonest_answers,
    describe_missing,
    missing_rewards,
    rollout_score,
    task_scores,
)
from agl_trainer.rollout.task_list import load_list, task_ids


def evaluate(training: Training, label: str, sampling: Sampling | None = None) -> EvalResult:
    """Rewards of each held-out task under the current adapters.

    A failed rollout counts as 0. One without a reward is left out, as in training, and a warning names it. Raises
    TrainingError if none has a reward.
    """
    train = training.train
    if train.eval_tasks is None:
        raise ConfigError("train.eval_tasks is not set; name a function that returns the held-out tasks")
    rollouts, sampling = training.rollouts, sampling or Sampling()
    sampling.check(train.eval_temperature)
    tasks = load_list(train.eval_tasks, "train.eval_tasks")
    names = task_ids(tasks)
    name = f"{training.run}-eval-{label}"
    wanted = [
        rollouts.make(
            f"{name}-{index:04d}" + (f"-s{sample}" if sample else ""),
            task,
            None,
            "eval",
            derive(train.seed, "evaluation", names[index], sample),
        )
        for index, task in enumerate(tasks)
        for sample in range(sampling.samples)
    ]
    with training.progress.phase(f"evaluating {label}", steps=len(wanted)):
        rollouts.make_live()
        outcomes = rollouts.run(wanted, counts_steps=True)[: len(wanted)]
        read = training.store.query_spans_by_rollout([outcome.rollout_id for outcome in outcomes])
        trajectories = [build_trajectory(spans) if (spans := read[one.rollout_id]) else None for one in outcomes]
        scores = [rollout_score(*read) for read in zip(outcomes, trajectories, strict=True)]
        missing = [outcome.rollout_id for outcome, score in zip(outcomes, scores, strict=True) if score is None]
        warn_of_missing_rewards(missing, "the evaluation")
        answered = sum(outcome.error is None for outcome in outcomes)
        if line := describe_missing(missing_rewards(outcomes, filter(None, trajectories)), answered):
            training.progress.note(line)
        if len(missing) == len(scores):
            raise TrainingError(f"{name}: no rollout has a reward; set train.reward or call agl.emit_reward")
        by_task = task_scores(names, scores, sampling)
        result = EvalResult(label, by_task, commonest_answers(filter(None, trajectories)), len(missing))
        ids = {task: wanted[index * sampling.samples].rollout_id for index, task in enumerate(names)}
        training.store.put_resource(evaluation_record(training.run, label, str(training.folder / "eval"), ids))
        training.progress.update(reward=result.mean())
    return result


def evaluate_step(training: Training) -> EvalResult:
    """Evaluate after this step of the phase, save the result, and keep the adapters if it is the best one so far."""
    state = training.state
    result = evaluate(training, f"step-{state.phase_step:05d}")
    result.save(training.folder / "eval" / f"{result.label}.json")
    for line in result.doubts():
        training.progress.note(line)
    training.forget_prompts()
    state.best = next_best(state.best, state.step, result.mean())
    if state.best.waited == 0:
        save_checkpoint(_best_folder(training), training.checkpoint())
    return result


def load_best(training: Training) -> None:
    """Load the adapters of the best evaluation. Raises TrainingError if there was none."""
    checkpoint = load_checkpoint(checkpoint_folder(_best_folder(training), best_of(training).step))
    with training.weights_locked():
        for role, adapter in checkpoint.adapters.items():
            training.policies.of(role).load_adapter(role, adapter, checkpoint.versions[role])


def prune_best(training: Training) -> None:
    """Remove the adapters of all but the best evaluation."""
    keep_only(_best_folder(training), best_of(training).step)


def best_of(training: Training) -> Best:
    if training.state.best is None:
        raise TrainingError(f"no evaluation of {training.folder} was kept; set train.eval_every")
    return training.state.best


def _best_folder(training: Training) -> Path:
    return training.folder / "best"
