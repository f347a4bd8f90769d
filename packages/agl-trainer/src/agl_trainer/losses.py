"""The documented place of the policy losses, which `agl_trainer.algo.losses` implements."""

from agl_trainer.algo.losses import policy_loss

__all__ = ["policy_loss"]
