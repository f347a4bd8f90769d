"""`sft`: supervised fine-tuning, and which rollouts of the store to train on."""

from typing import Literal, Self

from pydantic import Field, model_validator

from agl.config.section import Count, Positive, Reference, Section


class TracesConfig(Section):
    """Which rollouts of the store to train on."""

    modes: list[Literal["train", "eval", "prod"]] = Field(default_factory=lambda: ["train", "prod"])
    """Modes of the rollouts."""
    tags: dict[str, str | bool | int | float] = Field(default_factory=dict)
    """Span attributes, as `agl.emit_annotation` writes them; a rollout needs each of them on at least one span."""


class SftTracesConfig(TracesConfig):
    """Which rollouts of the store to fine-tune on, and which calls in them."""

    min_reward: float | None = None
    """Minimum reward of the call's role or, if the role has none, of the rollout; none: rewards are ignored."""
    roles: list[str] = Field(default_factory=list)
    """Roles whose calls are trained on; default: all under `agent_roles`."""


class SftConfig(Section):
    """Supervised fine-tuning (`agl sft`), on examples or on rollouts of the store."""

    examples: Reference | None = None
    """Function without arguments that returns a list of `{"role", "messages", "completion"}`, each optionally with
    `tools`. The completion is text as the model samples it, or an assistant message, also with `tool_calls`, which the
    chat template writes. Either this or `traces`."""
    traces: SftTracesConfig | None = None
    """Rollouts of the store, instead of examples."""
    epochs: Count = 3
    """Passes over the examples."""
    batch_size: Count = 8
    """Examples per step, all of one role."""
    learning_rate: Positive = 1e-3
    """Highest learning rate of the supervised steps."""

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if (self.examples is None) == (self.traces is None):
            raise ValueError("expected either examples or traces")
        return self
