"""The forward pass of LoRA layers over tokens that belong to different adapters.

PEFT keeps, names and saves the adapters; its own forward pass for mixed batches gathers and scatters rows in every
layer. Here the tokens of one adapter stand side by side, so a layer is three matrix products on slices:

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
from agl_trainer.model.cpu.products import FrozenProduct

BASE = "__base__"
"""Adapter name of the base model alone (PEFT's own spelling)."""


@dataclass(slots=True)
class Routing:
    """Which adapter the tokens of the present pass go through: runs of (adapter, places).

    The places of the only run are None, all that there are: compiled code is for one value of what stands here.
    """

    runs: Sequence[tuple[str, slice | None]] = ()

    def set(self, adapters: Sequence[str]) -> None:
        """`adapters` names one adapter for all tokens, or one for each of them."""
        runs: list[tuple[str, slice | None]] = []
        start = 0
        for adapter, run in groupby(adapters):
            end = start + sum(1 for _ in run)
            runs.append((adapter, slice(start, end)))
            start = end
        self.runs = [(adapters[0], None)] if len(runs) == 1 else runs


@dataclass(frozen=True, slots=True)
class _Delta:
    """What one adapter adds to a layer: `down` [r, in], `up` [out, r], the very parameters that are trained."""

    down: Tensor
    up: Tensor
    scaling: float

    def add_to(self, out: Tensor, x: Tensor) -> None:
        """In place, to `out` [N, out] for `x` [N, in]."""
        inner = (x.to(self.down.dtype) @ self.down.T).to(out.dtype)
        out.addmm_(inner, self.up.T.to(out.dtype), alpha=self.scaling)


@dataclass(frozen=True, slots=True)
class Routed:
    """A linear layer, and what each adapter adds to it."""

    base: Callable[[Tensor], Tensor]
    deltas: Mapping[str, _Delta] = field(default_factory=dict)
    routing: Routing = field(default_factory=Routing)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., out] for `x` [..., in]."""
        rows = x.flatten(0, -2)
        out = self.base(rows)
        self.add_deltas(out, rows)
        return out.view(*x.shape[:-1], -1)

    def add_deltas(self, out: Tensor, x: Tensor) -> None:
        """In place, to `out` [N, out] for `x` [N, in], what the adapter of each row adds."""
        for adapter, run in self.routing.runs:
            if adapter != BASE and run is None:
                self.deltas[adapter].add_to(out, x)  # of a view the backward pass would copy gradients
            elif adapter != BASE:
                self.deltas[adapter].add_to(out[run], x[run])


def route_layers(model: PeftModel, routing: Routing) -> None:
    """Let every LoRA layer of `model`, which has all its adapters, follow `routing`: its `forward` is a `Routed`'s.

    Raises TrainingError for a layer that is not linear.
    """
    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, layer in layers.items():
        base = layer.get_base_layer()
        if not isinstance(base, torch.nn.Linear):
            raise TrainingError(f"layer {name} is a {type(base).__name__}; only LoRA on linear layers is supported")
        # What is kept in fewer bits, as by bitsandbytes, unpacks its weight itself.
        product = FrozenProduct(base) if base.weight.is_floating_point() else base
        routed = Routed(product, _deltas(layer), routing)
        layer.forward = routed.__call__  # a method, of which compiled code is for any object


def _deltas(layer: Any) -> dict[str, _Delta]:
    return {
        adapter: _Delta(
            layer.get_parameter(f"lora_A.{adapter}.weight"),
            layer.get_parameter(f"lora_B.{adapter}.weight"),
            layer.scaling[adapter],
        )
        for adapter in layer.lora_A
    }
