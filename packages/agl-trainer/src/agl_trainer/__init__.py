"""GRPO and SFT over recorded agent spans: one LoRA adapter per role on one frozen base model."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agl_trainer.trainer import Trainer

__all__ = ["Trainer"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: importing the trainer takes torch's seconds, and the `agl` program looks in here often.
    if name == "Trainer":
        from agl_trainer.trainer import Trainer

        return Trainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
