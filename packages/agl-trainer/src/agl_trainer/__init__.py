"""GRPO and SFT on recorded agent spans: one LoRA adapter per role on a frozen base model."""

import logging
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agl_trainer.loop.trainer import Trainer

__all__ = ["Trainer"]

# PEFT imports it if installed; it then logs advice to install kernels that have no backward pass.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# GNU OpenMP, with which torch computes on a CPU, reads this when torch is loaded. A worker without work would otherwise
# spin for 3 ms and keep a core from the threads that have work, if other programs compute; now it is about 50 µs.
if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")


def __getattr__(name: str) -> Any:
    # Lazy: it imports torch, which takes seconds, and every `agl` command imports this package.
    if name == "Trainer":
        from agl_trainer.loop.trainer import Trainer

        return Trainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
