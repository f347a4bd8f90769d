"""Gradient checkpointing: activations of a layer are recomputed in the backward pass instead of being stored.

Only the input of each layer is kept (arXiv 1604.06174). The option of transformers has no effect here: it applies to
models in training mode, and this model stays in evaluation mode because the engine samples from the same modules.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from agl_trainer.model.base_model import decoder_layers
from agl_trainer.model.lora import AdapterRouting


@dataclass(frozen=True, slots=True)
class RecomputedLayer:
    """A layer that keeps only its input if gradients are computed; without gradients it is unchanged."""

    layer: Callable[..., Any]
    routing: AdapterRouting
    drops: bool
    """It draws random numbers (`lora_dropout`), which the backward pass has to draw again."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.layer(*args, **options)
        runs = self.routing.runs

        def run(*args: Any, **options: Any) -> Any:
            self.routing.runs = runs  # passes in between, e.g. with the same prefix, may have changed the routing
            return self.layer(*args, **options)

        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=self.drops, **options)


def recompute_layers(body: torch.nn.Module, routing: AdapterRouting, *, drops: bool) -> None:
    """Replace each layer's forward pass by a `RecomputedLayer`. Raises ConfigError as `decoder_layers`."""
    for layer in decoder_layers(body, "gradient_checkpointing"):
        layer.forward = RecomputedLayer(layer.forward, routing, drops)
