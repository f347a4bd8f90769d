"""Layers of the base model as compiled code in training passes (torch.compile).

Each layer is compiled, not the model, so that layers of the same kind share one code. The second pass of another length
makes the number of tokens a variable in it. Attention over a trie stands outside (`attention`), and so does everything
else that changes from pass to pass; an adapter has a code of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from agl.errors import ConfigError
from agl_trainer.models import decoder_layers

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
    _try_out(next(body.parameters()).device)
    torch._dynamo.config.cache_size_limit = max(_CODES, torch._dynamo.config.cache_size_limit)
    for layer in layers:
        layer.forward = Compiled(layer.forward, torch.compile(layer.forward))


def _try_out(device: torch.device) -> None:
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except RuntimeError as error:
        needed = "a C++ compiler, as g++ or what $CXX names" if device.type == "cpu" else "Triton and a C compiler"
        raise ConfigError(
            f"train.compile: torch cannot compile here: {str(error).splitlines()[0]}; it needs {needed}: install "
            "that, or leave train.compile out"
        ) from error
