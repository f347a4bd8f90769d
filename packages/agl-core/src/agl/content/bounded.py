"""Bounded text and JSON of any value: what cannot be read, or is too deep or too large, is replaced by a short text."""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

logger = logging.getLogger("agl")

MAX_DEPTH = 50
MAX_VALUES = 100_000
MAX_SECONDS = 1.0
MAX_BITS = 4096
"""Of an integer. Python refuses to write much larger ones."""


def text_of(value: object, convert: Callable[[Any], object] = str) -> str:
    """`convert(value)` as text that UTF-8 can encode, or the value's type if that raises."""
    try:
        return str(convert(value)).encode(errors="backslashreplace").decode()
    except Exception:  # noqa: BLE001 - code of the user
        return f"<{type(value).__name__} without text>"


def bounded_json(value: Any, convert: Callable[[Any], Any]) -> str:
    """`value` as compact JSON. `convert` returns the JSON value of objects that JSON has no form for. Never raises."""
    logger.debug("%s is not JSON as it is; what JSON has no form for is recorded as text", type(value).__name__)
    return json.dumps(_Reader(convert).read(value), separators=(",", ":"))


class _Reader:
    """Copies one value into JSON values within the limits."""

    def __init__(self, convert: Callable[[Any], Any]) -> None:
        self._convert = convert
        self._values_left = MAX_VALUES
        self._deadline = time.monotonic() + MAX_SECONDS
        self._open: set[int] = set()
        """Identities of the values that contain the one being read."""

    def read(self, value: Any) -> Any:
        self._values_left -= 1
        if id(value) in self._open:
            return f"<circular {type(value).__name__}>"
        if len(self._open) >= MAX_DEPTH or self._values_left < 0 or time.monotonic() > self._deadline:
            return f"<{type(value).__name__} left out: the value is too deep or too large>"
        self._open.add(id(value))
        try:
            return self._read(value)
        except Exception:  # noqa: BLE001 - code of the user, or a value that another thread changes
            return text_of(value)
        finally:
            self._open.discard(id(value))

    def _read(self, value: Any) -> Any:
        match value:
            case Enum():
                return self.read(value.value)
            case None | bool() | str():
                return value
            case int():
                return int(value) if value.bit_length() <= MAX_BITS else f"<int of {value.bit_length()} bits>"
            case float():
                return float(value) if math.isfinite(value) else None
            case Mapping():
                return {key if isinstance(key, str) else text_of(key): self.read(item) for key, item in value.items()}
            case list() | tuple():
                return [self.read(item) for item in value]
        converted = self._convert(value)
        return converted if isinstance(converted, str) else self.read(converted)
