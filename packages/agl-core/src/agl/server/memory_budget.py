"""Backpressure: a limit on the bytes that a server holds in memory because their spans are not committed yet."""

import threading
from types import TracebackType
from typing import Self


class MemoryBudget:
    """At most `limit` bytes over all requests of a server."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._reserved = 0
        self._lock = threading.Lock()

    def add(self, size: int) -> bool:
        """Reserve `size` more bytes; a negative size releases. False, without any effect, if the limit is exceeded."""
        with self._lock:
            if size > 0 and self._reserved + size > self._limit:
                return False
            self._reserved += size
            return True


class Reservation:
    """The bytes of one request; the context manager releases them on exit."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self._size = 0

    def grow_to(self, size: int) -> bool:
        """Reserve at least `size` bytes in total; False if the budget has no room for them now."""
        if size <= self._size:
            return True
        if not self._budget.add(size - self._size):
            return False
        self._size = size
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._budget.add(-self._size)
        self._size = 0
