"""The state of the random number generators that a training draws from, as JSON values."""

import base64
import random
import struct
from typing import Any

import torch

_WORDS = struct.Struct("<625I")  # CPython's Mersenne Twister: 624 words and the position


def capture() -> dict[str, Any]:
    """State of Python's `random` and of torch, on the CPU and on every CUDA device."""
    version, words, gauss = random.getstate()
    return {
        "python": {"version": version, "words": _encode(_WORDS.pack(*words)), "gauss": gauss},
        "torch": _from_tensor(torch.get_rng_state()),
        "cuda": [_from_tensor(state) for state in torch.cuda.get_rng_state_all()],
    }


def restore(state: dict[str, Any]) -> None:
    """Put back what `capture` gave; CUDA states are left out on a machine with another number of devices."""
    python = state["python"]
    random.setstate((python["version"], _WORDS.unpack(base64.b64decode(python["words"])), python["gauss"]))
    torch.set_rng_state(_to_tensor(state["torch"]))
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_to_tensor(text) for text in state["cuda"]])


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _from_tensor(state: torch.Tensor) -> str:
    return _encode(bytes(state.tolist()))


def _to_tensor(text: str) -> torch.Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)
