"""The options of a policy loss, named as in TRL's GRPOConfig."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, get_args

from agl.errors import TrainingError

LossName = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
LOSSES: tuple[LossName, ...] = get_args(LossName)
SamplingCorrection = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]

_SCALE_RL_CAP = 5.0
"""arXiv 2510.13786, section 3.2: above it CISPO's weight is cut."""


@dataclass(frozen=True, slots=True)
class LossOptions:
    """How to make a loss of tokens; the defaults are TRL's where no text says otherwise."""

    name: LossName = "grpo"
    loss_type: LossName | None = None
    """Normalise as TRL does for this loss. None: each rollout weighs the same, whatever its rows and tokens."""
    epsilon: float = 0.2
    epsilon_high: float | None = None
    """None: as `epsilon`; for cispo 5.0."""
    delta: float | None = None
    """Upper bound of the ratio where the clip has none, at negative advantages: the c of dual-clip PPO."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    beta: float = 0.0
    """Weight of the KL divergence from the reference."""
    use_bias_correction_kl: bool = True
    entropy_coef: float = 0.0
    top_entropy_quantile: float = 1.0
    """Share of the tokens, those of highest entropy, that the policy loss is taken of."""
    off_policy_mask_threshold: float | None = None
    vllm_importance_sampling_mode: SamplingCorrection | None = None
    """None: `sampling_logprobs` correct nothing."""
    vllm_importance_sampling_clip_max: float | None = 3.0
    vllm_importance_sampling_clip_min: float | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    max_completion_length: int | None = None
    """What dr_grpo divides by; None: the width of the batch."""
    gradient_accumulation_steps: int = 1
    """Batches like this one in an optimizer step, for TRL's means over a batch."""

    @classmethod
    def parse(cls, name: str, options: Mapping[str, Any]) -> Self:
        """Raises TrainingError for a loss or an option that is not known, or that cannot be meant."""
        known = {field.name for field in fields(cls)} - {"name"}
        if unknown := sorted(set(options) - known):
            raise TrainingError(f"loss option {', '.join(unknown)} is not known; known are {', '.join(sorted(known))}")
        made = cls(**{"name": name, **options})
        made._check()
        return made

    def _check(self) -> None:
        for given in (self.name, self.loss_type):
            if given is not None and given not in LOSSES:
                raise TrainingError(f"loss {given!r} is not known; expected one of {', '.join(LOSSES)}")
        if self.importance_sampling_level not in ("token", "sequence"):
            raise TrainingError(
                f"importance_sampling_level is {self.importance_sampling_level!r}, expected token or sequence"
            )
        if not 0 < self.top_entropy_quantile <= 1:
            raise TrainingError(f"top_entropy_quantile is {self.top_entropy_quantile}, expected above 0 and up to 1")
        self._check_sampling_correction()

    def _check_sampling_correction(self) -> None:
        mode = self.vllm_importance_sampling_mode
        if mode is None:
            return
        if mode not in get_args(SamplingCorrection):
            known = ", ".join(get_args(SamplingCorrection))
            raise TrainingError(f"vllm_importance_sampling_mode is {mode!r}, expected one of {known}")
        if self.name == "vespo" and mode.startswith("sequence"):
            raise TrainingError(f"vespo weighs sequences itself; its vllm_importance_sampling_mode is {mode}")
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        if low is None and high is None:
            raise TrainingError(f"{mode} needs vllm_importance_sampling_clip_max or vllm_importance_sampling_clip_min")
        if low is not None and high is not None and low >= high:
            raise TrainingError(f"vllm_importance_sampling_clip_min {low} is not below clip_max {high}")

    @property
    def highest_ratio(self) -> float:
        """cispo: the cap itself; else the distance from 1 at which the ratio is clipped above."""
        if self.epsilon_high is not None:
            return self.epsilon_high
        return _SCALE_RL_CAP if self.name == "cispo" else self.epsilon

    @property
    def needs_entropies(self) -> bool:
        return self.entropy_coef != 0 or self.top_entropy_quantile < 1

    @property
    def trains_without_advantage(self) -> bool:
        """A token of advantage 0 has a gradient too."""
        return self.beta != 0 or self.entropy_coef != 0
