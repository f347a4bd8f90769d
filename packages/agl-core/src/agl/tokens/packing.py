"""Token ids and logprobs as packed bytes: one OTLP value instead of hundreds.

Packed form: little-endian int32 (ids) or float32 (logprobs). Unpacking also accepts other tools' plain number arrays.
"""

import sys
from array import array
from collections.abc import Iterable, Sequence
from typing import Final

ID_BYTES: Final = 4


def pack_ids(ids: Iterable[int]) -> bytes:
    """int32 little-endian bytes. Raises TypeError for a value that is no int, OverflowError for one outside int32."""
    return _little_endian(array("i", ids)).tobytes()


def unpack_ids(value: bytes | Sequence[int] | Sequence[float]) -> list[int]:
    """Ids from packed bytes or from an array of ints or doubles. Raises ValueError on a broken length or value."""
    if isinstance(value, bytes):
        return array_of_ids(value).tolist()
    ids = [int(item) for item in value]
    if any(number != item for number, item in zip(ids, value, strict=True)):
        raise ValueError("token ids must be whole numbers")
    return ids


def array_of_ids(packed: bytes) -> "array[int]":
    """Packed ids as an array of int32. Raises ValueError on a broken length."""
    return _unpack("i", packed)


def pack_logprobs(logprobs: Iterable[float]) -> bytes:
    """float32 little-endian bytes."""
    return _little_endian(array("f", logprobs)).tobytes()


def unpack_logprobs(value: bytes | Sequence[float]) -> list[float]:
    """Logprobs from packed bytes or from an array of numbers."""
    if isinstance(value, bytes):
        return _unpack("f", value).tolist()
    return [float(item) for item in value]


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
