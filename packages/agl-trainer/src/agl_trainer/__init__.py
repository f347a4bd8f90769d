"""GRPO and SFT on recorded agent spans: one LoRA adapter per role on a frozen base model."""

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agl_trainer.loop.trainer import Trainer

__all__ = ["Trainer"]

# PEFT imports it if installed; it then logs advice to install kernels that have no backward pass.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    # Lazy: it imports torch, which takes seconds, and every `agl` command imports this package.
    if name == "Trainer":
        from agl_trainer.loop.trainer import Trainer

        return Trainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
