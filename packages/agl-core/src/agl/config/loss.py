"""The keys of `train` that turn rewards into advantages, and advantages into a loss."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from agl.config.section import Fraction, Positive, Section

LossName = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
Normalization = Literal["rollout", "grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
AdvantageName = Literal["grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++_baseline", "gdpo", "max@k", "ema"]
RewardScale = Literal["group", "batch", "none"]
LogprobsMode = Literal["raw_logprobs", "processed_logprobs"]
"""In vLLM's terms: those of the model, or those of the distribution that tokens are sampled from."""

_TOKEN_CLIP = (0.2, 0.2)
"""Clip range of a token's importance ratio, below and above 1 (PPO, arXiv 1707.06347, table 1)."""
_SEQUENCE_CLIP = (3e-4, 4e-4)
"""Clip range of a sequence's importance ratio, a mean over its tokens (GSPO, arXiv 2507.18071, section 5.1)."""
_CISPO_RATIO_CAP = 5.0
"""Cap of the importance ratio in CISPO (ScaleRL, arXiv 2510.13786, section 3.2)."""


class PolicyLossConfig(Section):
    """Options of a policy loss, named as in TRL's GRPOConfig, where `importance_sampling_*` begins with `vllm_`."""

    loss: LossName = "grpo"
    """Policy loss, a function of advantage and importance ratio (agl_trainer.algo.losses). Its options are named as in
    TRL."""
    normalization: Normalization | None = None
    """What the sum of the losses of all tokens is divided by: one weight per `rollout`, or as TRL divides a loss; none:
    what the definition of `loss` divides by (agl_trainer.algo.normalization)."""
    epsilon: Positive | None = None
    """Clip range of the importance ratio, below 1 and above it. Default: 0.2; for sequences 3e-4 below, 4e-4 above."""
    epsilon_high: Positive | None = None
    """Clip range above 1; default: `epsilon`. For cispo the cap of the ratio; default: 5.0."""
    delta: Positive | None = None
    """Upper bound of the importance ratio at negative advantages (dual clip)."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """One importance ratio per `token`, or per row (`sequence`, GSPO)."""
    beta: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KL divergence from the reference policy."""
    reference: Literal["start", "base"] = "start"
    """Reference policy: the adapters as GRPO began (`start`, e.g. after SFT), or the base model without adapter
    (`base`)."""
    use_bias_correction_kl: bool = True
    """Multiply the KL divergence by the importance ratio."""
    entropy_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the entropy bonus."""
    top_entropy_quantile: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the tokens, those of highest entropy, that the policy loss includes."""
    off_policy_mask_threshold: Positive | None = None
    """KL divergence from the sampling policy above which a row with a negative advantage is masked out."""
    importance_sampling_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] | None = (
        None
    )
    """How to correct for an engine whose probabilities differ from the policy's; none: no correction."""
    importance_sampling_clip_max: Positive | None = 3.0
    """Upper bound of the correction's weights."""
    importance_sampling_clip_min: Positive | None = None
    """Lower bound of the correction's weights."""
    sapo_temperature_pos: Positive = 1.0
    """Loss sapo: temperature at positive advantages."""
    sapo_temperature_neg: Positive = 1.05
    """Loss sapo: temperature at the other advantages."""
    vespo_k_pos: Positive = 2.0
    """Loss vespo: k at advantages of at least 0."""
    vespo_lambda_pos: Positive = 3.0
    """Loss vespo: lambda at advantages of at least 0."""
    vespo_k_neg: Positive = 3.0
    """Loss vespo: k at negative advantages."""
    vespo_lambda_neg: Positive = 2.0
    """Loss vespo: lambda at negative advantages."""

    @property
    def effective_normalization(self) -> Normalization:
        """`normalization`, or that of `loss`. The mean over responses of grpo and sapo is a mean over rollouts here."""
        return self.normalization or ("rollout" if self.loss in ("grpo", "sapo") else self.loss)

    @property
    def clip_range(self) -> tuple[float, float]:
        """Distances below and above 1 at which the importance ratio is clipped."""
        low, high = _SEQUENCE_CLIP if self.importance_sampling_level == "sequence" else _TOKEN_CLIP
        if self.epsilon is not None:
            low = high = self.epsilon
        return low, high if self.epsilon_high is None else self.epsilon_high

    @property
    def ratio_cap(self) -> float:
        """Cap of the importance ratio in cispo."""
        return _CISPO_RATIO_CAP if self.epsilon_high is None else self.epsilon_high

    @property
    def needs_entropies(self) -> bool:
        return self.entropy_coef != 0 or self.top_entropy_quantile < 1

    @property
    def trains_without_advantage(self) -> bool:
        """A token of advantage 0 also has a gradient."""
        return self.beta != 0 or self.entropy_coef != 0

    @model_validator(mode="after")
    def _has_valid_sampling_correction(self) -> Self:
        mode = self.importance_sampling_mode
        low, high = self.importance_sampling_clip_min, self.importance_sampling_clip_max
        if mode is None:
            return self
        if self.loss == "vespo" and mode.startswith("sequence"):
            raise ValueError(f"vespo weighs sequences itself; importance_sampling_mode is {mode}, choose token_*")
        if low is None and high is None:
            raise ValueError(f"{mode} needs importance_sampling_clip_max or importance_sampling_clip_min")
        if low is not None and high is not None and low >= high:
            raise ValueError(f"importance_sampling_clip_min is {low}, expected less than clip_max, {high}")
        return self


class LossConfig(PolicyLossConfig):
    """The policy loss, the advantages that it weighs tokens with, and the calls that it leaves out."""

    advantage: AdvantageName = "grpo"
    """How a rollout's reward is compared with others: the estimator of the advantage (agl_trainer.algo.advantages)."""
    scale_rewards: RewardScale = "group"
    """Divisor of the advantages of grpo: the standard deviation of their `group`, of the whole `batch`, or `none`."""
    max_at_k: Annotated[int, Field(ge=2)] = 4
    """The k of advantage max@k."""
    ema_decay: Fraction = 0.95
    """Advantage ema: weight of the old value when a step updates a role's running mean of rewards."""
    mask_truncated_completions: bool = False
    """Leave responses that reached the length limit out of the loss."""
    overlong_buffer: Annotated[int, Field(ge=0)] = 0
    """Tokens before `max_tokens` within which a response is penalised (DAPO, arXiv 2503.14476, eq. 13); 0: never."""
    overlong_penalty: Positive = 1.0
    """Reward that a response of `max_tokens`, or a truncated one, loses."""
    max_staleness: Annotated[int, Field(ge=0)] | None = None
    """Versions by which the policy that sampled a call may be older than the current one; older calls are dropped."""
    logprobs_mode: LogprobsMode | None = None
    """Which logprobs the store has, for `--from-store`; none: raw. A training finds out what its engine records."""

    @model_validator(mode="after")
    def _has_no_unused_key(self) -> Self:
        for key, owner, is_used in (
            ("max_at_k", "advantage max@k", self.advantage == "max@k"),
            ("ema_decay", "advantage ema", self.advantage == "ema"),
            ("scale_rewards", "advantage grpo", self.advantage == "grpo"),
            ("epsilon", "a loss that clips", self.loss not in ("cispo", "sapo", "vespo")),
            ("epsilon_high", "a loss that clips", self.loss not in ("sapo", "vespo")),
            ("delta", "a loss that clips", self.loss not in ("cispo", "sapo", "vespo")),
            ("overlong_penalty", "overlong_buffer", self.overlong_buffer > 0),
            ("use_bias_correction_kl", "beta", self.beta > 0),
            ("reference", "beta", self.beta > 0),
        ):
            if not is_used and key in self.keys_set():
                raise ValueError(f"{key} does nothing without {owner}")
        return self

    def keys_set(self) -> list[str]:
        """Keys of the loss that the configuration sets to something else than their default."""
        fields = LossConfig.model_fields
        return [key for key in fields if key in self.model_fields_set and getattr(self, key) != fields[key].default]
