"""The options of a policy loss under the names that TRL's GRPOConfig gives them."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from agl.config import PolicyLossConfig
from agl.errors import TrainingError

_ENGINE_CORRECTION = ("importance_sampling_mode", "importance_sampling_clip_max", "importance_sampling_clip_min")
_KEYS = {
    f"vllm_{key}" if key in _ENGINE_CORRECTION else key: key for key in PolicyLossConfig.model_fields if key != "loss"
}
"""Name in TRL to key of the configuration."""
_DEFAULTS = {"epsilon": 0.2}
"""TRL's defaults that differ from those of the configuration."""
_NAMES = {key: name for name, key in _KEYS.items()}


def parse_trl_options(loss: str, options: Mapping[str, Any]) -> PolicyLossConfig:
    """The configuration of `loss` with TRL's `options`. Raises TrainingError for an unknown or invalid option."""
    if unknown := sorted(options.keys() - _KEYS.keys()):
        raise TrainingError(f"loss option {', '.join(unknown)} is not known; known are {', '.join(sorted(_KEYS))}")
    try:
        return PolicyLossConfig.model_validate(
            {"loss": loss} | _DEFAULTS | {_KEYS[name]: options[name] for name in options}
        )
    except ValidationError as error:
        raise TrainingError("; ".join(map(_describe, error.errors()))) from error


def _describe(item: Any) -> str:
    """One validation error: the option, the value got, and what was expected."""
    message = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if not item["loc"]:
        return message
    key = item["loc"][0]
    return f"{_NAMES.get(key, key)} is {item['input']!r}, expected {message}"
