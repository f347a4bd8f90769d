"""The agent that a configuration names."""

from collections.abc import Callable
from typing import Any

from agl.config import TrainConfig
from agl.runner.command import Addresses, Command
from agl.runner.import_function import load_function


def configured_agent(train: TrainConfig, addresses: Addresses) -> Callable[[Any], Any]:
    """`train.agent` or `train.command`. Raises ConfigError if it cannot be loaded, or there is none."""
    if train.command is not None:
        return Command.parse(train.command, addresses, (train.max_memory_mb or 0) * 2**20)
    return load_function(train.agent, "train.agent")


def configured_reward(train: TrainConfig) -> Callable[[Any, Any], Any] | None:
    """`train.reward`. Raises ConfigError if it cannot be loaded."""
    return load_function(train.reward, "train.reward") if train.reward else None
