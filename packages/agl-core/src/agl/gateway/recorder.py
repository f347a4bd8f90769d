"""Calls on their way into the store: those that end together are committed together."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from agl.span import Span
from agl.store import Store
from agl.store.span_row import SpanRow

_Waiting = tuple[list[SpanRow], asyncio.Future[None]]


class Recorder:
    """Appends to `store` in a thread, at most one batch at a time. For one event loop; `close` it at the end."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._waiting: list[_Waiting] = []
        self._writing: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "agl-recorder")

    async def record(self, spans: Sequence[Span]) -> None:
        """Returns when `spans` are committed; they are, too, if the caller is cancelled meanwhile.

        Raises AglError where they cannot be kept, TypeError or OverflowError where they are no spans to keep.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(([SpanRow.of(span) for span in spans], done))
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())
        await done

    async def close(self) -> None:
        """Wait for what is being written."""
        if self._writing is not None:
            await self._writing
        self._thread.shutdown()

    async def _write(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch, self._waiting = self._waiting, []
            errors = await loop.run_in_executor(self._thread, self._append, batch)
            for (_, done), error in zip(batch, errors, strict=True):
                if not done.done():
                    done.set_result(None) if error is None else done.set_exception(error)
        self._writing = None

    def _append(self, batch: list[_Waiting]) -> list[Exception | None]:
        """The error of each call; where all together fail, each is tried alone."""
        try:
            self._store.append_rows([row for rows, _ in batch for row in rows])
        except Exception as error:  # noqa: BLE001 - handed to the callers; the next batch must be written
            return [error] if len(batch) == 1 else [self._append([one])[0] for one in batch]
        return [None] * len(batch)
