"""The state of torch's random number generators as JSON values.

Python's `random` is not restored: OpenTelemetry draws span ids from it, and the store would take a span with a repeated
id for one that it already has.
"""

import base64
from typing import Any

import torch

from agl_trainer.model.device import best_device


def capture() -> dict[str, Any]:
    """State of torch's generators on the CPU and on the accelerator of this process, if there is one."""
    return {name: _from_tensor(module.get_rng_state()) for name, module in _generators().items()}


def restore(state: dict[str, Any]) -> None:
    """Restore a state of `capture`, without the generator of an accelerator that this machine does not have."""
    for name, module in _generators().items():
        if name in state:
            module.set_rng_state(_to_tensor(state[name]))


def _generators() -> dict[str, Any]:
    """Modules with `get_rng_state` and `set_rng_state`: torch itself for the CPU, and that of the accelerator."""
    device = best_device()
    return {"torch": torch} | ({} if device.type == "cpu" else {device.type: torch.get_device_module(device)})


def _from_tensor(state: torch.Tensor) -> str:
    return base64.b64encode(bytes(state.tolist())).decode("ascii")


def _to_tensor(text: str) -> torch.Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)
