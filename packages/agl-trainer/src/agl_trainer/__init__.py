"""GRPO and SFT over recorded agent spans: one LoRA adapter per role on one frozen base model."""

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agl_trainer.loop.trainer import Trainer

__all__ = ["Trainer"]

# PEFT imports it where it is installed, whereupon it asks for kernels that know no gradients.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    # Loaded when asked for: importing the trainer takes torch's seconds, and the `agl` program looks in here often.
    if name == "Trainer":
        from agl_trainer.loop.trainer import Trainer

        return Trainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
