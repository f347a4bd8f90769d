"""The gate before the engines: closed while weights change, so that no answer is sampled half by old ones."""

import asyncio
from typing import Final

from agl.server.api_error import ApiError

_RETRY_AFTER_S: Final = 1


class Gate:
    """Counts the calls that are with an engine; while `is_closed` no further one gets there. For one event loop."""

    def __init__(self) -> None:
        self.is_closed = False
        self.inside = 0
        self._empty = asyncio.Event()
        self._empty.set()

    def check(self) -> None:
        """Raises ApiError, which says when to ask again, while the gate is closed."""
        if self.is_closed:
            raise ApiError(
                429, "paused", "the gateway is paused while weights change; ask again", retry_after_s=_RETRY_AFTER_S
            )

    def enter(self) -> None:
        """Let a call through, until `leave`. Raises ApiError while the gate is closed."""
        self.check()
        self.inside += 1
        self._empty.clear()

    def leave(self) -> None:
        self.inside -= 1
        if self.inside == 0:
            self._empty.set()

    async def close(self, drain_s: float) -> int:
        """Let nobody in, and wait up to `drain_s` until everybody is out; returns how many are still inside."""
        self.is_closed = True
        try:
            async with asyncio.timeout(drain_s):
                await self._empty.wait()
        except TimeoutError:
            return self.inside
        return 0

    def open(self) -> None:
        self.is_closed = False
