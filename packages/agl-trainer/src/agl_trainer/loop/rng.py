"""The state of torch's random number generators as JSON values.

Python's `random` is not restored: OpenTelemetry draws span ids from it, and the store would take a span with a repeated
id for one that it already has.
"""

import base64
from typing import Any

import torch


def capture() -> dict[str, Any]:
    """State of torch's generators on the CPU and on every CUDA device."""
    return {
        "torch": _from_tensor(torch.get_rng_state()),
        "cuda": [_from_tensor(state) for state in torch.cuda.get_rng_state_all()],
    }


def restore(state: dict[str, Any]) -> None:
    """Restore a state of `capture`, without the CUDA generators if the number of devices differs."""
    torch.set_rng_state(_to_tensor(state["torch"]))
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_to_tensor(text) for text in state["cuda"]])


def _from_tensor(state: torch.Tensor) -> str:
    return base64.b64encode(bytes(state.tolist())).decode("ascii")


def _to_tensor(text: str) -> torch.Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)
