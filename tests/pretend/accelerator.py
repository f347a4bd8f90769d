"""A pretend accelerator, `pretend`, on torch's PrivateUse1 key: tensors whose values live on the CPU, but which no
operation takes together with CPU tensors.

Every operation runs the CPU's kernel on the values, so results equal the CPU's bit for bit where the same operations
run. As on most accelerators a tensor of one number may be on the CPU, and as on some there is no float64.

Import it in a process of its own: torch keeps the backend until the process ends.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

FREE_BYTES = 8_000_000_000


class Backend:
    """The module `torch.pretend`."""

    def __init__(self) -> None:
        self._generator = torch.Generator()

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def manual_seed_all(self, seed: int) -> None:
        self._generator.manual_seed(seed)

    def get_rng_state(self, _device: object = None) -> Tensor:
        return self._generator.get_state()

    def set_rng_state(self, state: Tensor, _device: object = None) -> None:
        self._generator.set_state(state)

    def mem_get_info(self, _device: object = None) -> tuple[int, int]:
        return FREE_BYTES, 2 * FREE_BYTES


_setup_privateuseone_for_python_backend("pretend", Backend())
DEVICE = torch.device("pretend:0")
CPU = torch.device("cpu")


class PretendTensor(Tensor):
    """A tensor on `DEVICE`; `values` are on the CPU."""

    values: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: Tensor) -> "PretendTensor":
        if values.dtype is torch.float64:
            raise TypeError("the pretend accelerator has no float64")
        with torch.inference_mode(values.is_inference()):  # a view of an older tensor is none of inference mode
            tensor = torch.Tensor._make_wrapper_subclass(
                cls,
                values.shape,
                strides=values.stride(),
                storage_offset=values.storage_offset(),
                dtype=values.dtype,
                device=DEVICE,
                requires_grad=values.requires_grad,
            )
        tensor.values = values
        return tensor

    def __repr__(self) -> str:  # type: ignore[override]  # torch adds options
        return f"PretendTensor({self.values})"

    def tolist(self) -> Any:
        return self.values.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name: str = func.overloadpacket.__name__
        device = kwargs.get("device")
        if name not in ("_to_copy", "copy_"):
            _require_one_device(func, (*args, *kwargs.values()))
        with torch._C._DisableTorchDispatch():
            found = func(*_on_cpu(args), **{key: _on_cpu(value) for key, value in kwargs.items()})
        if "out" in kwargs:
            return kwargs["out"]
        if name.endswith("_") and not name.endswith("__"):
            return args[0]
        if device is not None and torch.device(device).type == "cpu":
            return found
        return _on_pretend(found)


def _require_one_device(func: Any, values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, list | tuple):
            _require_one_device(func, value)
        elif isinstance(value, Tensor) and not isinstance(value, PretendTensor) and value.dim():
            raise RuntimeError(
                f"{func}: expected all tensors on {DEVICE}, found one on {value.device} of shape {[*value.shape]}"
            )


# Arguments and results of operations nest in lists and tuples only. `torch.utils._pytree`, which knows every container,
# takes several times as long as the operations.
def _on_cpu(value: Any) -> Any:
    if isinstance(value, PretendTensor):
        return value.values
    if isinstance(value, list | tuple):
        return type(value)(map(_on_cpu, value))
    return CPU if isinstance(value, torch.device) else value


def _on_pretend(value: Any) -> Any:
    if isinstance(value, Tensor):
        return PretendTensor(value)
    return type(value)(map(_on_pretend, value)) if isinstance(value, list | tuple) else value


def _empty(size: Any, *, dtype: Any = None, memory_format: Any = None, **_: Any) -> Tensor:
    return PretendTensor(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return PretendTensor(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Tensor, target: Tensor, _non_blocking: bool = False) -> Tensor:
    _on_cpu(target).copy_(_on_cpu(source))
    return target


_LIBRARY = torch.library.Library("aten", "IMPL")
_LIBRARY.impl("empty.memory_format", _empty, "PrivateUse1")
_LIBRARY.impl("empty_strided", _empty_strided, "PrivateUse1")
_LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")
