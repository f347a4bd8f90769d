"""Token ids, logprobs and importance ratios as packed bytes: one OTLP value instead of hundreds.

Packed form: little-endian int32 (ids) or float32 (logprobs, ratios). Unpacking ids and logprobs also accepts other
tools' plain number arrays.
Every function raises ValueError, and nothing else, for values that are not such numbers.
"""

import math
import sys
from array import array
from collections.abc import Iterable, Sequence
from typing import Final, Literal

ID_BYTES: Final = 4
LARGEST_ID: Final = 2**31 - 1
MAX_RATIOS: Final = 2**14
"""Most tokens whose ratios are packed: 64 KiB."""
_ROUNDING: Final = 1e-3
"""Most by which rounding may lift the logprob of a certain token above 0. Anything larger is a logit."""


def pack_ids(ids: Iterable[int]) -> bytes:
    """int32 little-endian bytes."""
    return _little_endian(check_ids(_array("i", ids, "token ids"))).tobytes()


def unpack_ids(value: bytes | Sequence[int] | Sequence[float]) -> list[int]:
    """Ids from packed bytes or from an array of ints or doubles."""
    if isinstance(value, bytes):
        return array_of_ids(value).tolist()
    try:
        ids = [int(item) for item in value]
    except (TypeError, OverflowError) as error:
        raise ValueError(f"not token ids: {error}") from error
    if any(number != item for number, item in zip(ids, value, strict=True)):
        raise ValueError("token ids must be whole numbers")
    return ids


def array_of_ids(packed: bytes) -> "array[int]":
    """Packed ids as an array of int32."""
    return _unpack("i", packed)


def check_ids(ids: "array[int]") -> "array[int]":
    """`ids`, which are all from 0 to LARGEST_ID."""
    if ids and not min(ids) >= 0:
        raise ValueError(f"a token id is {min(ids)}, expected 0 to {LARGEST_ID}")
    return ids


def pack_logprobs(logprobs: Iterable[float]) -> bytes:
    """float32 little-endian bytes. The values are not checked, so that a span shows what the engine sent."""
    return _little_endian(_array("f", logprobs, "logprobs")).tobytes()


def check_logprobs(logprobs: list[float]) -> list[float]:
    """`logprobs`, which are all finite and at most 0."""
    if not all(map(math.isfinite, logprobs)):
        raise ValueError("a logprob is not finite")
    if logprobs and max(logprobs) > _ROUNDING:
        raise ValueError(f"a logprob is {max(logprobs):g}, expected at most 0: does the engine return logits?")
    return logprobs


def unpack_logprobs(value: bytes | Sequence[float]) -> list[float]:
    """Logprobs from packed bytes or from an array of numbers."""
    if isinstance(value, bytes):
        return _unpack("f", value).tolist()
    return _array("d", value, "logprobs").tolist()


def pack_ratios(ratios: Sequence[float]) -> bytes:
    """float32 little-endian bytes of the first `MAX_RATIOS`; a single value if all are equal."""
    items = _array("f", ratios[:MAX_RATIOS], "ratios")
    return _little_endian(items[:1] if len(set(items)) == 1 else items).tobytes()


def unpack_ratios(value: bytes) -> list[float]:
    ratios = _unpack("f", value).tolist()
    if not all(map(math.isfinite, ratios)):
        raise ValueError("a ratio is not finite")
    return ratios


def _array(typecode: Literal["i", "f", "d"], items: Iterable[float], what: str) -> array:
    try:
        return array(typecode, items)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"not {what}: {error}") from error


def _unpack(typecode: str, value: bytes) -> array:
    items = array(typecode)
    if len(value) % items.itemsize:
        raise ValueError(f"{len(value)} bytes are not a whole number of {items.itemsize}-byte values")
    items.frombytes(value)
    return _little_endian(items)


def _little_endian(items: array) -> array:
    """Swap between native and little-endian order, in place; its own inverse."""
    if sys.byteorder == "big":
        items.byteswap()
    return items
