"""The optimizer steps of a training step: every adapter on its minibatches."""

import math
from collections.abc import Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from agl.config import Config, PolicyLossConfig
from agl_trainer.algo.batch import GrpoBatch
from agl_trainer.algo.objective import Objective
from agl_trainer.algo.options import RoleState
from agl_trainer.algo.ratios import high_entropy_threshold
from agl_trainer.algo.sft_loss import sft_loss
from agl_trainer.compute.forward import RowValues, forward_rows
from agl_trainer.compute.optimizer_step import StepStats, merge_stats, optimizer_step
from agl_trainer.data.rows import SampledRow
from agl_trainer.data.truncation import Truncation
from agl_trainer.model.adapter_files import Tensors
from agl_trainer.model.lora import BASE
from agl_trainer.model.policies import Policies
from agl_trainer.model.policy import Policy


def role_states(config: Config, policies: Policies, step: int, baselines: Mapping[str, float]) -> dict[str, RoleState]:
    """State of every role at training step `step`; with `train.alternate_steps` only one adapter's roles train."""
    train, roles = config.require_train(), config.agent_roles.roles
    training = [owner for owner in policies.adapters if not roles[owner].frozen]
    if train.alternate_steps and training:
        training = [training[step // train.alternate_steps % len(training)]]
    return {
        role: RoleState(
            owner in training,
            policy.versions[role],
            roles[role].rewards,
            baselines.get(role, 0.0),
            len(policy.output_weight),
            base.engine.max_model_len,
        )
        for base, policy in zip(config.bases(), policies, strict=True)
        for owner, sharing in policy.adapters.items()
        for role in sharing
    }


def train_batch(
    policy: Policy,
    optimizers: Mapping[str, torch.optim.Optimizer],
    batch: GrpoBatch,
    config: Config,
    references: Mapping[str, Tensors] | None = None,
) -> dict[str, StepStats]:
    """Take the optimizer steps of each adapter that has rows; returns their statistics by adapter.

    The reference policy of an adapter is the adapter in `references`, else the base model. `batch` marks the calls of a
    skipped optimizer step as dropped.
    """
    train, stats = config.require_train(), {}
    for owner, roles in policy.adapters.items():
        minibatches = batch.minibatches(roles)
        # All before the first step: they need the policy as it is at the beginning of the training step.
        objectives = {
            number: sft_loss
            if train.algorithm == "rejection"
            else prepare_objective(
                policy,
                owner,
                rows,
                train,
                pack_tokens=train.pack_tokens,
                is_first=index == 0,
                reference=(references or {}).get(owner),
            )
            for index, (number, rows) in enumerate(minibatches.items())
        }
        steps = []
        for number, rows in minibatches.items():
            step = optimizer_step(
                policy,
                owner,
                optimizers[owner],
                rows,
                objectives[number],
                pack_tokens=train.pack_tokens,
                max_grad_norm=train.max_grad_norm,
                entropy_gradient=train.entropy_coef != 0,
            )
            if step.was_skipped:
                batch.skip(roles, number)
            elif isinstance(objective := objectives[number], Objective):
                batch.add_ratios(objective.ratios(rows, step.logprobs))
            steps.append(step)
        if steps:
            stats[owner] = merge_stats(steps)
    return stats


def prepare_objective(
    policy: Policy,
    role: str,
    rows: Sequence[SampledRow],
    config: PolicyLossConfig,
    *,
    pack_tokens: int | None,
    is_first: bool,
    reference: Tensors | None = None,
) -> Objective:
    """The objective of an optimizer step over `rows`; `is_first`: no other step precedes it in the training step.

    `reference` is the adapter of the reference policy; None: the base model.
    Runs forward passes for the values that the loss needs but rows do not hold: logprobs of the reference, entropies
    of all tokens, and, unless it is the first step, logprobs of the policy before the training step.
    """
    tokens = sum(sum(row.loss_mask) for row in rows)
    of_reference = _reference_logprobs(policy, role, rows, reference, pack_tokens) if config.beta != 0 else None
    needs_initial = not is_first and (config.importance_sampling_mode is not None or _lacks_logprobs(rows))
    needs_entropies = config.top_entropy_quantile < 1
    current = forward_rows(policy, role, rows, pack_tokens) if needs_entropies or needs_initial else RowValues()
    threshold = None
    if needs_entropies:
        entropies = torch.cat([current.entropies[row.key] for row in rows])
        threshold = high_entropy_threshold(entropies, config.top_entropy_quantile)
        tokens = int((entropies >= threshold).sum())
    return Objective(config, 1 / max(tokens, 1), threshold, of_reference, current.logprobs if needs_initial else None)


def _reference_logprobs(
    policy: Policy, role: str, rows: Sequence[SampledRow], reference: Tensors | None, pack_tokens: int | None
) -> dict[Hashable, Tensor]:
    """Of the whole distribution: the divergence of the truncated policy from the reference then has no other term."""
    whole = {row.key: replace(row, truncation=Truncation()) for row in rows}
    with nullcontext() if reference is None else policy.replaced_adapter(role, reference):
        found = forward_rows(policy, BASE if reference is None else role, list(whole.values()), pack_tokens).logprobs
    return {key: found[row.key] for key, row in whole.items()}


def _lacks_logprobs(rows: Sequence[SampledRow]) -> bool:
    return any(math.isnan(logprob) for row in rows for logprob in row.trained(row.logprobs))
