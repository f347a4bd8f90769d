"""Layers of the base model as compiled code in training passes (torch.compile).

Each layer is compiled, not the model, so that layers of the same kind share one code. The second pass of another length
makes the number of tokens a variable in it. Attention over a trie stands outside (`attention`), and so does everything
else that changes from pass to pass; an adapter has a code of its own.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from agl.errors import ConfigError
from agl_trainer.model.base_model import decoder_layers

_CODES: Final = 64
"""Most codes of one function, of which every adapter needs one for each kind of layer. By itself torch makes 8."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """A layer that runs as compiled code where gradients are taken; without them, so in sampling, it is as it was."""

    layer: Callable[..., Any]
    code: Callable[..., Any]

    def __call__(self, hidden: Tensor, *args: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.layer(hidden, *args, **options)
        if not hidden.requires_grad:
            hidden = hidden.clone().requires_grad_()  # the first layer then shares the code of the others
        return self.code(hidden, *args, **options)


def compile_layers(body: torch.nn.Module) -> None:
    """Let each layer of the decoder `body` be `Compiled`.

    Raises ConfigError where none is marked as one, or where torch cannot compile on this machine.
    """
    layers = decoder_layers(body, "compile")
    if why := refusal(next(body.parameters()).device.type):
        raise ConfigError(f"train.compile: {why}; install that, or leave train.compile out")
    torch._dynamo.config.cache_size_limit = max(_CODES, torch._dynamo.config.cache_size_limit)
    for layer in layers:
        layer.forward = Compiled(layer.forward, torch.compile(layer.forward))


@functools.cache
def refusal(device: str) -> str | None:
    """Why torch cannot compile for devices of this type; None where it can."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except RuntimeError as error:
        needed = "a C++ compiler, as g++ or what $CXX names" if device == "cpu" else "Triton and a C compiler"
        return f"torch cannot compile here: {str(error).splitlines()[0]}; it needs {needed}"
    return None
