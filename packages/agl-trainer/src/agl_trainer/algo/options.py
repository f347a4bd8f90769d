"""What the batch builder has to know besides the rollouts: the options of the training, and the state of each role."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from agl.config import Config, LogprobsMode, LossConfig
from agl.trajectory import Call
from agl_trainer.algo.credit import OverlongPenalty, Weights
from agl_trainer.algo.rejection import Rejection


@dataclass(frozen=True, slots=True)
class RoleState:
    """A role at the beginning of a training step."""

    trains: bool = True
    version: int | None = None
    """Current version of its policy."""
    weights: Weights = field(default_factory=dict)
    """The role's own weights of reward dimensions, 0 for others; empty: those of the configuration."""
    baseline: float = 0.0
    """Running mean of its rewards, for advantage ema."""
    vocabulary_size: int | None = None
    """Tokens that its base model knows."""
    max_row_tokens: int | None = None
    """Maximum length of a row; calls that end beyond it are dropped."""


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """How the rewards of a step become weighted training rows."""

    loss: LossConfig = field(default_factory=LossConfig)
    gamma: float = 1.0
    """Discount per hand-off between roles."""
    turn_gamma: float = 1.0
    """Discount per call."""
    rejection: Rejection | None = None
    """Rejection sampling: train on the kept rollouts, every call with advantage 1."""
    minibatches: int = 1
    max_tokens: int = 1
    """Maximum length of a response."""
    logprobs_mode: LogprobsMode = "processed_logprobs"
    """Which logprobs calls have."""
    reward_weights: Weights = field(default_factory=dict)
    """Weights of reward dimensions for roles without their own; empty: all alike."""
    from_store: bool = False
    """Any policy may have sampled the calls, also if its version has the number of the current one."""
    represented: float = 1.0
    """Mean number of groups that a group of the store stands for, where sampling left others out."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Request fields that limit the distribution of training calls."""

    @classmethod
    def of(
        cls,
        config: Config,
        logprobs_mode: LogprobsMode = "processed_logprobs",
        *,
        from_store: bool = False,
        represented: float = 1.0,
    ) -> Self:
        """The options of the sections `train` and `agent_roles`."""
        train, roles = config.require_train(), config.agent_roles
        return cls(
            loss=train,
            gamma=roles.gamma,
            turn_gamma=roles.turn_gamma,
            rejection=Rejection(train.min_reward) if train.algorithm == "rejection" else None,
            minibatches=train.minibatches,
            max_tokens=train.max_tokens,
            logprobs_mode=logprobs_mode,
            reward_weights=config.rewards,
            from_store=from_store,
            represented=represented,
            sampling=train.sampling.settings(),
        )

    @property
    def overlong(self) -> OverlongPenalty | None:
        """The penalty of overlong responses, if the configuration has one."""
        buffer = self.loss.overlong_buffer
        return OverlongPenalty(self.max_tokens, buffer, self.loss.overlong_penalty) if buffer else None

    def has_logprobs(self, call: Call) -> bool:
        """Its logprobs are those of the distribution that it was sampled from."""
        is_whole = not self.sampling and call.temperature in (None, 1.0)
        return is_whole or self.logprobs_mode == "processed_logprobs"
