"""Public import path of `agl_trainer.algo.losses`."""

from agl_trainer.algo.losses import policy_loss

__all__ = ["policy_loss"]
