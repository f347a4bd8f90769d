"""The forward pass of LoRA layers over tokens that belong to different adapters.

PEFT keeps, names and saves the adapters; its own forward pass for mixed batches gathers and scatters rows in every
layer. Here the tokens of one adapter stand side by side, so a layer is three matrix products on slices:

    y = W x + scaling * B (A x)        (LoRA, arXiv 2106.09685, section 4.1)
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from peft import PeftModel
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor

from agl.errors import TrainingError

BASE = "__base__"
"""Adapter name of the base model alone (PEFT's own spelling)."""


@dataclass(slots=True)
class Routing:
    """Which adapter the tokens of the present pass go through: runs of (adapter, number of tokens)."""

    runs: Sequence[tuple[str, int]] = ()

    def set(self, adapters: Sequence[str], tokens: int) -> None:
        """`adapters` names one adapter for all `tokens`, or one for each of them."""
        if len(adapters) == 1:
            self.runs = [(adapters[0], tokens)]
        else:
            self.runs = [(adapter, sum(1 for _ in run)) for adapter, run in groupby(adapters)]


def route_layers(model: PeftModel, routing: Routing) -> None:
    """Let every LoRA layer of `model` follow `routing`. Raises TrainingError for a layer that is not a plain Linear."""
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            # The base may be kept in fewer bits than the residual stream.
            kept_as = module.get_parameter("base_layer.weight").dtype
            module.forward = functools.partial(_forward, module, kept_as, routing)
        elif isinstance(module, LoraLayer):
            raise TrainingError(f"layer {name} is a {type(module).__name__}; only LoRA on linear layers is supported")


def _forward(layer: Linear, kept_as: torch.dtype, routing: Routing, x: Tensor) -> Tensor:
    """[..., out] for `x` [..., in]; the base's weights are of type `kept_as`."""
    rows = x.flatten(0, -2)
    out = layer.base_layer(rows.to(kept_as)).to(x.dtype)
    if len(routing.runs) == 1:
        return _add_delta(layer, routing.runs[0][0], rows, out).view(*x.shape[:-1], -1)
    pieces, start = [], 0
    for adapter, count in routing.runs:
        run = slice(start, start + count)
        pieces.append(_add_delta(layer, adapter, rows[run], out[run]))
        start += count
    return torch.cat(pieces).view(*x.shape[:-1], -1)


def _add_delta(layer: Linear, adapter: str, hidden: Tensor, out: Tensor) -> Tensor:
    """[N, out] for `hidden` [N, in] and what the base made of it."""
    if adapter == BASE:
        return out
    down, up = layer.lora_A[adapter].get_parameter("weight"), layer.lora_B[adapter].get_parameter("weight")
    inner = (hidden.to(down.dtype) @ down.T).to(out.dtype)
    return torch.addmm(out, inner, up.T.to(out.dtype), alpha=layer.scaling[adapter])
