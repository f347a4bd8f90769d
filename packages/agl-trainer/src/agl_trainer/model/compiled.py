"""Compiles the layers of the base model for training passes (torch.compile).

Each layer is compiled rather than the whole model, so that layers of the same kind share one compiled code. From the
second pass length on, the number of tokens is a variable in it. Attention over a prefix tree is excluded, as is all
else that changes from pass to pass; every adapter has its own code.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from agl.errors import ConfigError
from agl_trainer.model.base_model import decoder_layers

_MAX_VARIANTS: Final = 64
"""Limit of compiled variants per function (torch's default is 8). Each adapter needs one per kind of layer."""


@dataclass(frozen=True, slots=True)
class CompiledLayer:
    """A layer that runs compiled code if gradients are computed; without gradients, as in sampling, it is unchanged."""

    layer: Callable[..., Any]
    compiled: Callable[..., Any]

    def __call__(self, hidden: Tensor, *args: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.layer(hidden, *args, **options)
        if not hidden.requires_grad:
            hidden = hidden.clone().requires_grad_()  # so that the first layer shares the code of the others
        return self.compiled(hidden, *args, **options)


def compile_layers(body: torch.nn.Module) -> None:
    """Make each layer a `CompiledLayer`. Raises ConfigError as `decoder_layers`, or if torch cannot compile here."""
    layers = decoder_layers(body, "compile")
    if reason := compile_error(next(body.parameters()).device.type):
        raise ConfigError(f"train.compile: {reason}; install that, or leave train.compile out")
    torch._dynamo.config.cache_size_limit = max(_MAX_VARIANTS, torch._dynamo.config.cache_size_limit)
    for layer in layers:
        layer.forward = CompiledLayer(layer.forward, torch.compile(layer.forward))


@functools.cache
def compile_error(device: str) -> str | None:
    """The reason why torch cannot compile for this device type; None if it can."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except RuntimeError as error:
        needed = "a C++ compiler, as g++ or what $CXX names" if device == "cpu" else "Triton and a C compiler"
        return f"torch cannot compile here: {str(error).splitlines()[0]}; it needs {needed}"
    return None
