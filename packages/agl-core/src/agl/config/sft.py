"""`sft`: supervised fine-tuning, and which rollouts of the store are trained on."""

from typing import Literal, Self

from pydantic import Field, model_validator

from agl.config.section import Count, Positive, Reference, Section


class TracesConfig(Section):
    """Which rollouts of the store are learnt from."""

    modes: list[Literal["train", "eval", "prod"]] = Field(default_factory=lambda: ["train", "prod"])
    tags: dict[str, str | bool | int | float] = Field(default_factory=dict)
    """Attributes that some span of a rollout must have, as `agl.emit_annotation` writes them."""


class SftTracesConfig(TracesConfig):
    """The same, and which calls of them."""

    min_reward: float | None = None
    """Least reward, of the call's role or else of the rollout; none: any, or none at all."""
    roles: list[str] = Field(default_factory=list)
    """Roles whose calls are learnt from; none: all under `agent_roles`."""


class SftConfig(Section):
    """Supervised fine-tuning (`agl sft`), on examples or on what the store holds."""

    examples: Reference | None = None
    """Function without arguments that returns a list of `{"role", "messages", "completion"}`."""
    traces: SftTracesConfig | None = None
    """Rollouts of the store in place of examples."""
    epochs: Count = 3
    batch_size: Count = 8
    learning_rate: Positive = 1e-3

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if (self.examples is None) == (self.traces is None):
            raise ValueError("expected either examples or traces")
        return self
