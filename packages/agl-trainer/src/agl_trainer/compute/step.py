"""A GRPO step: what the configuration makes of a batch, and the optimizer steps of each adapter over it."""

from collections.abc import Mapping

import torch

from agl.config import Config, LossConfig
from agl_trainer.algo.batch_builder import BatchOptions, GrpoBatch, RoleState
from agl_trainer.algo.credit import Overlong
from agl_trainer.algo.options import LossOptions
from agl_trainer.algo.rejection import Rejection
from agl_trainer.algo.sft_loss import sft_loss
from agl_trainer.compute.objective import prepare
from agl_trainer.compute.update import Update, merge_updates, update_role
from agl_trainer.model.policy import Policy


def batch_options(config: Config, vocabulary: int | None = None) -> BatchOptions:
    """`vocabulary`: how many tokens the policy knows."""
    train, roles = config.require_train(), config.agent_roles
    overlong = Overlong(train.max_tokens, train.overlong_buffer, train.overlong_penalty)
    return BatchOptions(
        gamma=roles.gamma,
        turn_gamma=roles.turn_gamma,
        overlong=overlong if train.overlong_buffer else None,
        advantage=train.advantage,
        scale_rewards=train.scale_rewards,
        k=train.max_at_k,
        rejection=Rejection(train.min_reward) if train.algorithm == "rejection" else None,
        minibatches=train.minibatches,
        loss_type=train.loss_type,
        max_completion_length=train.max_tokens,
        keeps_zero_advantage=loss_options(train).trains_without_advantage,
        mask_truncated_completions=train.mask_truncated_completions,
        max_staleness=train.max_staleness,
        max_row_tokens=config.engine.max_model_len,
        vocabulary=vocabulary,
        is_tempered=train.logprobs_mode == "processed_logprobs",
    )


def loss_options(train: LossConfig) -> LossOptions:
    """Raises TrainingError for options that do not go together."""
    same = ("epsilon", "epsilon_high", "delta", "importance_sampling_level", "beta", "use_bias_correction_kl")
    same += ("entropy_coef", "top_entropy_quantile", "off_policy_mask_threshold")
    same += ("sapo_temperature_pos", "sapo_temperature_neg")
    same += ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")
    correction = ("importance_sampling_mode", "importance_sampling_clip_max", "importance_sampling_clip_min")
    options = {name: getattr(train, name) for name in same} | {f"vllm_{n}": getattr(train, n) for n in correction}
    return LossOptions.parse(train.loss, options)


def role_states(config: Config, policy: Policy, step: int, baselines: Mapping[str, float]) -> dict[str, RoleState]:
    """What step number `step` has to know of each role: who trains, and under which version, weights and baseline."""
    train, roles = config.require_train(), config.agent_roles.roles
    training = [owner for owner in policy.adapters if not roles[owner].frozen]
    if train.alternate_steps and training:
        training = [training[step // train.alternate_steps % len(training)]]
    return {
        role: RoleState(owner in training, policy.versions[role], roles[role].rewards, baselines.get(role, 0.0))
        for owner, sharing in policy.adapters.items()
        for role in sharing
    }


def train_batch(
    policy: Policy, optimizers: Mapping[str, torch.optim.Optimizer], batch: GrpoBatch, config: Config
) -> dict[str, Update]:
    """Take the optimizer steps of each adapter that has rows; returns what they did by adapter.

    The calls of a step that was not taken are marked in `batch`.
    """
    train = config.require_train()
    options, updates = loss_options(train), {}
    for owner, roles in policy.adapters.items():
        parts = batch.minibatches(roles)
        objectives = {
            number: sft_loss
            if train.algorithm == "rejection"
            else prepare(policy, owner, rows, options, pack_tokens=train.pack_tokens, moves=place > 0)
            for place, (number, rows) in enumerate(parts.items())
        }
        taken = []
        for number, rows in parts.items():
            update = update_role(
                policy,
                owner,
                optimizers[owner],
                rows,
                objectives[number],
                pack_tokens=train.pack_tokens,
                max_grad_norm=train.max_grad_norm,
                entropy_gradient=options.entropy_coef != 0,
            )
            if update.was_skipped:
                batch.skip(roles, number)
            taken.append(update)
        if taken:
            updates[owner] = merge_updates(taken)
    return updates
