"""The documented place of the advantages, which `agl_trainer.algo.advantages` implements."""

from agl_trainer.algo.advantages import group_advantages

__all__ = ["group_advantages"]
