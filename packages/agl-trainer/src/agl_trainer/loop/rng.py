"""The state of torch's random number generators as JSON values.

Python's `random` is not restored: OpenTelemetry draws span ids from it, and the store would take a span with a repeated
id for one that it already has.
"""

import base64
from typing import Any

import torch

from agl_trainer.model.device import best_device


def capture() -> dict[str, Any]:
    """State of torch's generators on the CPU and on the accelerators of this machine, if there are any."""
    return {name: _from_tensor(module.get_rng_state(*device)) for name, (module, device) in _generators().items()}


def restore(state: dict[str, Any]) -> None:
    """Restore a state of `capture`, without the generators of accelerators that this machine does not have."""
    for name, (module, device) in _generators().items():
        if name in state:
            module.set_rng_state(_to_tensor(state[name]), *device)


def _generators() -> dict[str, tuple[Any, tuple[torch.device, ...]]]:
    """Modules with `get_rng_state` and `set_rng_state`, and the device to name: none for that of this process."""
    kind, found = best_device().type, {"torch": (torch, tuple[torch.device, ...]())}
    if kind == "cpu":
        return found
    module, own = torch.get_device_module(kind), torch.accelerator.current_device_index()
    others = [torch.device(kind, number) for number in range(torch.accelerator.device_count()) if number != own]
    return found | {kind: (module, ())} | {str(device): (module, (device,)) for device in others}


def _from_tensor(state: torch.Tensor) -> str:
    return base64.b64encode(bytes(state.tolist())).decode("ascii")


def _to_tensor(text: str) -> torch.Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)
