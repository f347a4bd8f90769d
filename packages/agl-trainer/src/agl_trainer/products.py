"""Products with the frozen weights of the base model, in the layout that this processor's kernels read fastest.

A product of few rows with a plain weight spends most of its time on bringing the weight into the kernel's layout. On
CPUs each weight is therefore kept a second time in that layout, made when it is first needed: by sampling, and by
whatever else runs without gradients. Half the time of 8 rows in float32, and three quarters of it with 32.
"""

import torch
from torch import Tensor

_ROWS = 32
"""For which number of rows a layout is chosen; it serves any."""


class FrozenProduct:
    """x W^T + bias for a weight [out, in] that never changes."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self._bias = bias
        self._packed: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """[..., out] for `x` [..., in]; differentiable in `x`."""
        if torch.is_grad_enabled() or not _has_packed_kernel(self.weight):
            return torch.nn.functional.linear(x, self.weight, self._bias)
        if self._packed is None:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), _ROWS)
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")


def _has_packed_kernel(weight: Tensor) -> bool:
    kernels = torch.backends.mkldnn.is_available() and weight.device.type == "cpu"
    return kernels and weight.dtype in (torch.float32, torch.bfloat16)
