"""Converts the state of a torch optimizer to named tensors and JSON, so that checkpoints need no pickle."""

import json
from typing import Any

import torch

from agl.errors import TrainingError


def flatten(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], str]:
    """`optimizer.state_dict()` as tensors named `<parameter index>.<name>` and JSON for everything else.

    Raises TrainingError for a value that JSON cannot represent.
    """
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            (tensors if isinstance(value, torch.Tensor) else values)[f"{index}.{name}"] = value
    try:
        return tensors, json.dumps({"values": values, "param_groups": state["param_groups"]})
    except TypeError as error:
        raise TrainingError(f"the optimizer has a state that a checkpoint cannot hold: {error}") from error


def unflatten(tensors: dict[str, torch.Tensor], text: str) -> dict[str, Any]:
    """The inverse of `flatten`, for `optimizer.load_state_dict`."""
    rest = json.loads(text)
    state: dict[int, dict[str, Any]] = {}
    for key, value in (tensors | rest["values"]).items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": [_group(group) for group in rest["param_groups"]]}


def _group(group: dict[str, Any]) -> dict[str, Any]:
    """`group` with its tuples, which JSON writes as lists; only `params` is a list."""
    return {key: tuple(value) if isinstance(value, list) and key != "params" else value for key, value in group.items()}
