"""The keys of `train` that turn rewards into a loss."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from agl.config.section import Fraction, Positive, Section


class LossConfig(Section):
    """The keys of `train` that make rewards into a loss, named as in TRL's GRPOConfig."""

    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++_baseline", "max@k", "ema"] = "grpo"
    """How rewards are compared (agl_trainer.algo.advantages)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What advantages of grpo are divided by: the standard deviation of their group, of the whole step, or nothing."""
    max_at_k: Annotated[int, Field(ge=2)] = 4
    """The k of advantage max@k."""
    ema_decay: Fraction = 0.95
    """How much of a role's running mean is kept in a step, of advantage ema."""
    loss: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"] = "grpo"
    """What is made of advantage and ratio (agl_trainer.algo.losses)."""
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"] | None = None
    """Normalise as TRL does for this loss; none: each rollout weighs the same."""
    epsilon: Positive = 0.2
    """Clip range of the probability ratio (PPO, arXiv 1707.06347, eq. 7)."""
    epsilon_high: Positive | None = None
    """Above 1; as `epsilon` where it is not set. For cispo the cap of the ratio, 5.0."""
    delta: Positive | None = None
    """Upper bound of the ratio at negative advantages (dual clip)."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Ratio of each token, or of the whole row (GSPO)."""
    beta: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KL divergence from the base model."""
    use_bias_correction_kl: bool = True
    entropy_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the entropy bonus."""
    top_entropy_quantile: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the tokens, those of highest entropy, that train."""
    mask_truncated_completions: bool = False
    """Do not train on answers that were cut at their longest."""
    overlong_buffer: Annotated[int, Field(ge=0)] = 0
    """Tokens before `max_tokens` within which an answer loses reward (DAPO, arXiv 2503.14476, eq. 13); 0: none."""
    overlong_penalty: Positive = 1.0
    """What an answer of `max_tokens` loses."""
    off_policy_mask_threshold: Positive | None = None
    """KL divergence from which on a bad row that the policy has left behind is not trained on."""
    importance_sampling_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] | None = (
        None
    )
    """Correct for an engine that samples otherwise than the policy; TRL's names begin with `vllm_`."""
    importance_sampling_clip_max: Positive | None = 3.0
    importance_sampling_clip_min: Positive | None = None
    max_staleness: Annotated[int, Field(ge=0)] | None = None
    """Versions that a call's policy may be behind; older calls are dropped."""
    logprobs_mode: Literal["raw_logprobs", "processed_logprobs"] = "raw_logprobs"
    """What the engine records, in vLLM's words: the model's own logprobs, or those after the temperature."""
    sapo_temperature_pos: Positive = 1.0
    sapo_temperature_neg: Positive = 1.05
    vespo_k_pos: Positive = 2.0
    vespo_lambda_pos: Positive = 3.0
    vespo_k_neg: Positive = 3.0
    vespo_lambda_neg: Positive = 2.0

    @model_validator(mode="after")
    def _is_used(self) -> Self:
        for key, owner, there in (
            ("max_at_k", "advantage max@k", self.advantage == "max@k"),
            ("ema_decay", "advantage ema", self.advantage == "ema"),
            ("scale_rewards", "advantage grpo", self.advantage == "grpo"),
            ("epsilon", "a loss that clips", self.loss not in ("cispo", "sapo", "vespo")),
            ("epsilon_high", "a loss that clips", self.loss not in ("sapo", "vespo")),
            ("delta", "a loss that clips", self.loss not in ("cispo", "sapo", "vespo")),
            ("overlong_penalty", "overlong_buffer", self.overlong_buffer > 0),
            ("use_bias_correction_kl", "beta", self.beta > 0),
        ):
            if (
                key in self.model_fields_set
                and not there
                and getattr(self, key) != type(self).model_fields[key].default
            ):
                raise ValueError(f"{key} does nothing without {owner}")
        return self
