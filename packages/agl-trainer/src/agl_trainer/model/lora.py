"""Forward pass of LoRA layers over tokens that belong to different adapters.

PEFT keeps, names and saves the adapters. Its own forward pass for mixed batches gathers and scatters rows in every
layer; here the tokens of one adapter are adjacent, so a layer is three matrix products on slices:

    y = W x + scaling * B (A x)        (LoRA, arXiv 2106.09685, section 4.1)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from agl.errors import TrainingError
from agl_trainer.model.cpu.frozen_linear import FrozenLinear

BASE = "__base__"
"""Name of the base model without an adapter (PEFT's own spelling)."""


@dataclass(slots=True)
class AdapterRouting:
    """The adapter of each token of the current pass, as (adapter, slice of tokens).

    The slice is None if all tokens have the same adapter: torch.compile would specialize code on its numbers.
    """

    runs: Sequence[tuple[str, slice | None]] = ()

    def set(self, adapters: Sequence[str]) -> None:
        """`adapters` names one adapter for all tokens, or one per token."""
        runs: list[tuple[str, slice | None]] = []
        start = 0
        for adapter, run in groupby(adapters):
            end = start + sum(1 for _ in run)
            runs.append((adapter, slice(start, end)))
            start = end
        self.runs = [(adapters[0], None)] if len(runs) == 1 else runs


@dataclass(frozen=True, slots=True)
class _Delta:
    """Low-rank update of one adapter: `down` (A) [r, in] and `up` (B) [out, r], which are the trained parameters."""

    down: Tensor
    up: Tensor
    scaling: float
    dropout: float = 0.0
    """Share of the inputs that passes with gradients zero."""

    def add_to(self, out: Tensor, x: Tensor) -> None:
        """In place, to `out` [N, out] for `x` [N, in]."""
        if self.dropout and torch.is_grad_enabled():
            x = torch.nn.functional.dropout(x, self.dropout)
        inner = (x.to(self.down.dtype) @ self.down.T).to(out.dtype)
        out.addmm_(inner, self.up.T.to(out.dtype), alpha=self.scaling)


@dataclass(frozen=True, slots=True)
class LoraLinear:
    """A linear layer with the update of each adapter."""

    base: Callable[[Tensor], Tensor]
    deltas: Mapping[str, _Delta] = field(default_factory=dict)
    routing: AdapterRouting = field(default_factory=AdapterRouting)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., out] for `x` [..., in]."""
        rows = x.flatten(0, -2)
        out = self.base(rows)
        self.add_deltas(out, rows)
        return out.view(*x.shape[:-1], -1)

    def add_deltas(self, out: Tensor, x: Tensor) -> None:
        """Add each row's adapter update to `out` [N, out] in place, for `x` [N, in]."""
        for adapter, run in self.routing.runs:
            delta = self.deltas.get(adapter)  # none for the base model, and for adapters that leave this layer out
            if delta is not None and run is None:
                delta.add_to(out, x)  # no slice: the backward pass of a slice copies the gradient
            elif delta is not None:
                delta.add_to(out[run], x[run])


def route_layers(model: PeftModel, routing: AdapterRouting) -> None:
    """Replace the forward pass of every LoRA layer of `model`, which has all its adapters, by a `LoraLinear`.

    Raises TrainingError for a layer that is not linear.
    """
    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, layer in layers.items():
        base = layer.get_base_layer()
        if not isinstance(base, torch.nn.Linear):
            raise TrainingError(f"layer {name} is a {type(base).__name__}; only LoRA on linear layers is supported")
        # A quantized layer, e.g. of bitsandbytes, unpacks its weight itself.
        product = FrozenLinear(base) if base.weight.is_floating_point() else base
        lora = LoraLinear(product, _deltas(layer), routing)
        layer.forward = lora.__call__  # a bound method: torch.compile then shares code between layers


def _deltas(layer: Any) -> dict[str, _Delta]:
    return {
        adapter: _Delta(
            layer.get_parameter(f"lora_A.{adapter}.weight"),
            layer.get_parameter(f"lora_B.{adapter}.weight"),
            layer.scaling[adapter],
            getattr(layer.lora_dropout[adapter], "p", 0.0),
        )
        for adapter in layer.lora_A
    }
