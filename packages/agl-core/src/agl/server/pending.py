"""Backpressure: the bytes that a collector holds in memory because their spans are not committed yet."""

import threading
from types import TracebackType
from typing import Self


class PendingBytes:
    """At most `limit` bytes over all requests."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._lock = threading.Lock()

    def add(self, size: int) -> bool:
        """Hold `size` bytes more, or fewer where it is negative; False, and nothing changes, where that is too much."""
        with self._lock:
            if size > 0 and self._held + size > self._limit:
                return False
            self._held += size
            return True


class Room:
    """What one request holds; given back when it is left."""

    def __init__(self, pending: PendingBytes) -> None:
        self._pending = pending
        self._size = 0

    def hold(self, size: int) -> bool:
        """Hold at least `size` bytes; False where the collector has no room for them now."""
        if size <= self._size:
            return True
        if not self._pending.add(size - self._size):
            return False
        self._size = size
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pending.add(-self._size)
        self._size = 0
