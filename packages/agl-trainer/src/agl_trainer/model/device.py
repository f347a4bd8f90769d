"""The device that computes: the accelerator of this machine, or the CPU, and what torch can do on it.

The one place where kinds of accelerators are named. All other code takes the device of the tensors at hand.
"""

import functools
import gc

import torch
from torch import Tensor

_FLEX_ATTENTION = ("cuda", "xpu")
"""Device types (ROCm's is cuda) for which torch has a kernel of FlexAttention with gradients."""
_SLICE = 8192
"""Outputs whose weights are converted to float32 at once."""


def best_device() -> torch.device:
    """The accelerator of this machine (CUDA, ROCm, XPU, MPS or another backend of torch), else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def release_memory() -> None:
    """Give memory that torch keeps for later tensors back to the accelerator, for other programs."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def has_flex_attention(device: torch.device) -> bool:
    """Whether torch has a kernel of FlexAttention with gradients for `device`."""
    return device.type in _FLEX_ATTENTION


def wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T [N, out] in float32 or wider for `x` [N, in] and `weight` [out, in], without gradients.

    The products of bfloat16 numbers are exact in float32; only the sum is rounded, not to bfloat16 once more.
    """
    if x.dtype is weight.dtype and x.dtype.itemsize >= torch.float32.itemsize:
        return x @ weight.T
    if x.dtype is weight.dtype and _can_widen(x.device, x.dtype):
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return torch.cat([x.float() @ part.float().T for part in weight.split(_SLICE)], -1)


@functools.cache
def _can_widen(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the matrix product of this device can return float32 for `dtype`."""
    try:
        torch.mm(*torch.ones(2, 16, 16, dtype=dtype, device=device), out_dtype=torch.float32)
    except (NotImplementedError, RuntimeError):
        return False
    return True
