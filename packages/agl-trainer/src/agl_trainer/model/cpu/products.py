"""Products with the frozen weights of the base model, in the layout that this processor's kernels read fastest.

A product of few rows with a plain weight spends most of its time on bringing the weight into the kernel's layout. On
CPUs each weight is therefore kept a second time in that layout, made when sampling first needs it: of a narrow one in
float32 that is simply its transpose, two thirds of the time of the packed one with 8 rows; of all others that which
oneDNN packs, half the time of the plain one with 8 rows and three quarters with 32.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_ROWS = 32
"""For which number of rows a layout is chosen; it serves any."""
_NARROW = 1024
"""Outputs, up to which a transpose is read faster than what is packed."""


class PackedProduct:
    """x W^T + bias without gradients, for the rows of several weights [out, in] at once."""

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
        """`has_packed_kernel` has to hold for each weight."""
        self._dtype = weights[0].dtype
        self._bias = _joined(weights, biases)
        whole = torch.cat([weight.detach() for weight in weights])
        self._is_narrow = len(whole) <= _NARROW and whole.dtype is torch.float32
        self._weight: Tensor = (
            whole.T.contiguous() if self._is_narrow else torch.ops.mkldnn._reorder_linear_weight(whole, _ROWS)
        )

    def __call__(self, x: Tensor) -> Tensor:
        """[..., sum of out] for `x` [..., in], which may be of another precision."""
        rows = x.to(self._dtype)
        if not self._is_narrow:
            out = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")
        else:
            out = rows @ self._weight if self._bias is None else torch.add(rows @ self._weight, self._bias)
        return out.to(x.dtype)


class FrozenProduct:
    """x W^T + bias for the weight [out, in] of a layer that never changes."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._packed: PackedProduct | None = None

    # Asked of the layer each time: of one that is sharded, `weight` is the whole only during a pass.
    @property
    def weight(self) -> Tensor:
        return self._layer.weight

    @property
    def bias(self) -> Tensor | None:
        return getattr(self._layer, "bias", None)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., out] for `x` [..., in], which may be of another precision; differentiable in `x`."""
        weight = self.weight
        # torch.compile cannot ask for inference mode; where gradients are taken it need not.
        if torch.is_grad_enabled() or not torch.is_inference_mode_enabled() or not has_packed_kernel(weight):
            return torch.nn.functional.linear(x.to(weight.dtype), weight, self.bias).to(x.dtype)
        if self._packed is None:
            self._packed = PackedProduct([self.weight], [self.bias])
        return self._packed(x)


def has_packed_kernel(weight: Tensor) -> bool:
    """Whether products with `weight` can be packed where it is."""
    kernels = torch.backends.mkldnn.is_available() and weight.device.type == "cpu"
    return kernels and weight.dtype in (torch.float32, torch.bfloat16)


def _joined(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor | None:
    if all(bias is None for bias in biases):
        return None
    pairs = zip(weights, biases, strict=True)
    return torch.cat([weight.new_zeros(len(weight)) if bias is None else bias.detach() for weight, bias in pairs])
