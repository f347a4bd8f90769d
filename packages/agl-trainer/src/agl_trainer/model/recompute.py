"""Layers whose activations are computed a second time in the backward pass, in place of being kept until then.

What is left of a pass is the input of each layer (arXiv 1604.06174). transformers' own switch works on a model in
training mode only, which ours never is: the engine samples from the same modules.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from agl_trainer.model.base_model import decoder_layers
from agl_trainer.model.lora import Routing


@dataclass(frozen=True, slots=True)
class Recomputed:
    """A layer that keeps only its input where gradients are taken; without them, so while sampling, it is as it was."""

    layer: Callable[..., Any]
    routing: Routing

    def __call__(self, *args: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.layer(*args, **options)
        runs = self.routing.runs

        def run(*args: Any, **options: Any) -> Any:
            self.routing.runs = runs  # other passes may come between this one and its backward pass, as on a trunk
            return self.layer(*args, **options)

        # No layer draws random numbers: the model is in evaluation mode.
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **options)


def recompute_layers(body: torch.nn.Module, routing: Routing) -> None:
    """Let each layer of the decoder `body` be `Recomputed`. Raises ConfigError where none is marked as one."""
    for layer in decoder_layers(body, "gradient_checkpointing"):
        layer.forward = Recomputed(layer.forward, routing)
