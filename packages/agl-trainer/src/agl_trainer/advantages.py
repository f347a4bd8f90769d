"""Public import path of `agl_trainer.algo.advantages`."""

from agl_trainer.algo.advantages import group_advantages

__all__ = ["group_advantages"]
