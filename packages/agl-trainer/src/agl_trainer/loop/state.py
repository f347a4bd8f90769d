"""The state of a training between two steps: its counters and optimizers, saved to and restored from checkpoints."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

import torch

from agl.config import Config, PolicyLossConfig, TrainConfig
from agl.errors import TrainingError
from agl_trainer.loop import rng
from agl_trainer.loop.checkpoint import Checkpoint
from agl_trainer.model.adapter_files import Tensors, contiguous_copies
from agl_trainer.model.policies import Policies

SFT, GRPO = "sft", "grpo"
"""Phases of a training."""


@dataclass(frozen=True, slots=True)
class Best:
    """The step of a phase with the highest mean reward on the held-out tasks."""

    step: int
    reward: float
    waited: int = 0
    """Evaluations since then."""


def next_best(best: Best | None, step: int, reward: float) -> Best:
    """`best` after the evaluation of `step`; the earlier one of equals."""
    if best is None or reward > best.reward:
        return Best(step, reward)
    return replace(best, waited=best.waited + 1)


@dataclass(slots=True)
class TrainingState:
    """Everything that the next step depends on, except the policy and the random number generators."""

    step: int = 0
    """Steps done in all phases."""
    phase: str = SFT
    position: int = 0
    """Tasks or examples drawn in this phase."""
    phase_step: int = 0
    """Steps done in this phase."""
    epoch_size: int = 0
    """Tasks or examples of an epoch of this phase."""
    open_groups: list[int] = field(default_factory=list)
    """Numbers of the groups in flight beside the training."""
    empty_steps: int = 0
    """Last steps of this phase, in a row, in which no call trained."""
    baselines: dict[str, float] = field(default_factory=dict)
    """Role to the running mean of its rewards."""
    baseline_weights: dict[str, float] = field(default_factory=dict)
    """Role to the weight of that mean; see `next_baseline`."""
    best: Best | None = None
    references: dict[str, Tensors] | None = None
    """Owner of an adapter to the adapter as GRPO began, except fresh ones, which change nothing; None: not kept."""
    optimizers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)
    """Owner of an adapter to the adapter's optimizer."""

    def enter(self, phase: str, policies: Policies, train: TrainConfig) -> None:
        """Begin `phase`, or continue in it."""
        if self.phase != phase:
            self.phase, self.position, self.phase_step, self.best, self.optimizers = phase, 0, 0, None, {}
            self.epoch_size, self.open_groups, self.empty_steps = 0, [], 0
        for owner in policies.adapters:
            if owner not in self.optimizers:
                self.optimizers[owner] = _new_optimizer(policies, owner)
            for group in self.optimizers[owner].param_groups:
                group["weight_decay"], group["betas"] = train.weight_decay, (train.adam_beta1, train.adam_beta2)

    def set_learning_rate(self, learning_rate: float) -> None:
        """For the next step; a checkpoint's has no effect."""
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate

    def keep_references(self, policies: Policies, loss: PolicyLossConfig) -> None:
        """Copy the adapters as GRPO begins if they are the reference of its KL term.

        Raises TrainingError if GRPO began without it.
        """
        if loss.beta == 0 or loss.reference == "base":
            self.references = None
        elif self.phase_step == 0:
            versions = policies.versions
            trained = [owner for owner in policies.adapters if versions[owner] > 0]
            self.references = {owner: contiguous_copies(policies.of(owner).adapter(owner)) for owner in trained}
        elif self.references is None:
            raise TrainingError(
                f"train.beta is {loss.beta:g} and train.reference start, but the checkpoint has no copy of the "
                "adapters as GRPO began, because its training did not need them; set train.reference: base, or "
                "train.beta: 0, or another train.output_dir"
            )

    def count_step(self, policies: Policies, drawn: int, updated: set[str]) -> None:
        """Count a step that drew `drawn` tasks or examples and updated the roles `updated`."""
        self.step += 1
        self.phase_step += 1
        self.position += drawn
        for role in updated:
            policies.of(role).versions[role] += 1

    def to_checkpoint(self, policies: Policies, config: Config, base: Mapping[str, str]) -> Checkpoint:
        """`base`: fingerprints of the base models."""
        return Checkpoint(
            step=self.step,
            phase=self.phase,
            position=self.position,
            phase_step=self.phase_step,
            epoch_size=self.epoch_size,
            open_groups=self.open_groups,
            empty_steps=self.empty_steps,
            baselines=self.baselines,
            baseline_weights=self.baseline_weights,
            best=asdict(self.best) if self.best else None,
            references=self.references,
            versions=policies.versions,
            adapters={role: policies.of(role).adapter(role) for role in policies.roles},
            adapter_configs={role: policies.of(role).adapter_config(role) for role in policies.roles},
            optimizers={owner: optimizer.state_dict() for owner, optimizer in self.optimizers.items()},
            config=config.to_yaml(),
            base=base,
        )


def restore(checkpoint: Checkpoint, policies: Policies) -> TrainingState:
    """The state in `checkpoint`; also restores adapters and random number generators.

    Roles that the checkpoint lacks keep their fresh adapters. Raises TrainingError if an adapter does not fit.
    """
    for role in policies.roles:
        if role in checkpoint.adapters:
            policies.of(role).load_adapter(role, checkpoint.adapters[role], checkpoint.versions[role])
    state = TrainingState(checkpoint.step, checkpoint.phase, checkpoint.position, checkpoint.phase_step)
    state.epoch_size, state.open_groups = checkpoint.epoch_size, list(checkpoint.open_groups)
    state.empty_steps = checkpoint.empty_steps
    state.baselines, state.baseline_weights = dict(checkpoint.baselines), dict(checkpoint.baseline_weights)
    state.best = Best(**checkpoint.best) if checkpoint.best else None
    state.references = None if checkpoint.references is None else dict(checkpoint.references)
    for owner in policies.adapters:
        if owner in checkpoint.optimizers:
            state.optimizers[owner] = _new_optimizer(policies, owner)
            state.optimizers[owner].load_state_dict(checkpoint.optimizers[owner])
    rng.restore(checkpoint.rng)
    return state


def _new_optimizer(policies: Policies, owner: str) -> torch.optim.Optimizer:
    return torch.optim.AdamW(policies.of(owner).parameters(owner))
