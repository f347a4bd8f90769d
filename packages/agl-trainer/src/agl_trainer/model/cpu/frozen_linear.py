"""Linear layers with frozen weights, kept in the memory layout that the CPU's matmul kernels read fastest.

With few rows, a product with a plain weight spends most of its time on repacking the weight for the kernel. On CPUs
each weight is therefore kept a second time, repacked when sampling first uses it. A float32 weight with few outputs is
kept as its transpose (with 8 rows, 2/3 of the time of oneDNN's packed layout), all others in oneDNN's packed layout
(half the time of the plain weight with 8 rows, three quarters with 32).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_ROWS = 32
"""Number of rows for which oneDNN chooses its layout; the layout works for any number."""
_MAX_TRANSPOSED = 1024
"""Most outputs for which the transpose is faster than the packed layout."""


class PackedLinear:
    """x W^T + bias without gradients, for several weights [out, in] joined along `out`."""

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
        """Each weight must satisfy `can_be_packed`."""
        self._dtype = weights[0].dtype
        self._bias = _join_biases(weights, biases)
        joined = torch.cat([weight.detach() for weight in weights])
        self._is_transposed = len(joined) <= _MAX_TRANSPOSED and joined.dtype is torch.float32
        self._weight: Tensor = (
            joined.T.contiguous() if self._is_transposed else torch.ops.mkldnn._reorder_linear_weight(joined, _ROWS)
        )

    def __call__(self, x: Tensor) -> Tensor:
        """[..., sum of out] for `x` [..., in], in the dtype of `x`."""
        rows = x.to(self._dtype)
        if not self._is_transposed:
            out = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")
        else:
            out = rows @ self._weight if self._bias is None else torch.add(rows @ self._weight, self._bias)
        return out.to(x.dtype)


class FrozenLinear:
    """x W^T + bias with the weight [out, in] of a layer that is never trained."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._packed: PackedLinear | None = None

    # Read from the layer each time: a sharded layer has its whole weight only during a pass.
    @property
    def weight(self) -> Tensor:
        return self._layer.weight

    @property
    def bias(self) -> Tensor | None:
        return getattr(self._layer, "bias", None)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., out] for `x` [..., in], in the dtype of `x`; differentiable in `x`."""
        weight = self.weight
        # The gradient check comes first: torch.compile cannot trace the check for inference mode.
        if torch.is_grad_enabled() or not torch.is_inference_mode_enabled() or not can_be_packed(weight):
            return torch.nn.functional.linear(x.to(weight.dtype), weight, self.bias).to(x.dtype)
        if self._packed is None:
            self._packed = PackedLinear([self.weight], [self.bias])
        return self._packed(x)


def can_be_packed(weight: Tensor) -> bool:
    """Whether oneDNN has a packed layout for the device and dtype of `weight`."""
    kernels = torch.backends.mkldnn.is_available() and weight.device.type == "cpu"
    return kernels and weight.dtype in (torch.float32, torch.bfloat16)


def _join_biases(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor | None:
    if all(bias is None for bias in biases):
        return None
    pairs = zip(weights, biases, strict=True)
    return torch.cat([weight.new_zeros(len(weight)) if bias is None else bias.detach() for weight, bias in pairs])
