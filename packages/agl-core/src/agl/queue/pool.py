"""The writer pool: processes that each run a writer, more of them while the queue is long."""

import json
import logging
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

from agl.config import QueueConfig
from agl.errors import ConfigError, QueueError
from agl.queue.hook import QueueHook
from agl.queue.queue import SpanQueue

logger = logging.getLogger(__name__)

_GRACE_S: Final = 10.0
_HOOK_AGAIN_S: Final = 60.0


def next_size(size: int, length: int, calm_s: float, config: QueueConfig) -> int:
    """How many writers there should be, by the length of the queue, and for how long it has been far from high."""
    if length > config.high:
        return min(size + 1, config.max_writers)
    if calm_s >= config.shrink_after_s:
        return max(size - 1, config.min_writers)
    return size


class WriterPool:
    """Writers from `queue` to the store at `store_uri`: `min_writers` at first, looked after every `check_s`.

    A writer that dies is replaced by one of the same name. `stop` leaves what is not written in the queue. Raises
    ConfigError for a store that other processes cannot open.
    """

    def __init__(self, queue: SpanQueue, store_uri: str, config: QueueConfig | None = None) -> None:
        if store_uri.startswith("memory:"):
            raise ConfigError(f"writers are processes, which do not see {store_uri}; use sqlite:///path.db, say")
        self._queue = queue
        self._store_uri = store_uri
        self._config = config or QueueConfig()
        self._hook = QueueHook(self._config.on_queue_high) if self._config.on_queue_high else None
        self._hook_called_at = -_HOOK_AGAIN_S
        self._calm_since = time.monotonic()
        self._writers: list[subprocess.Popen[bytes]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look_after, name="agl-writer-pool", daemon=True)

    @property
    def pids(self) -> list[int]:
        """Of the writers that run."""
        return [writer.pid for writer in self._writers if writer.poll() is None]

    def start(self) -> None:
        self._resize(self._config.min_writers)
        self._thread.start()

    def stop(self) -> None:
        """End the writers, each after its commit under way."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._resize(0)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _look_after(self) -> None:
        while not self._stop.wait(self._config.check_s):
            self._replace_dead()
            try:
                length = self._queue.length()
            except QueueError as error:
                logger.warning("the length of the queue is not known: %s", error)
                continue
            self._adapt(length)
            self._tell(length)

    def _replace_dead(self) -> None:
        for slot, writer in enumerate(self._writers):
            if writer.poll() is not None:
                logger.warning("writer %s ended with %s and is replaced", self._name(slot), writer.returncode)
                _end([writer])
                self._writers[slot] = self._start(slot)

    def _adapt(self, length: int) -> None:
        now, size = time.monotonic(), len(self._writers)
        if length > self._config.high // 2:
            self._calm_since = now
        wanted = next_size(size, length, now - self._calm_since, self._config)
        if wanted != size:
            logger.info("%d spans in the queue: %d writers, so far %d", length, wanted, size)
            self._calm_since = now
            self._resize(wanted)

    def _tell(self, length: int) -> None:
        """Call the hook when the queue gets high, and every minute that it stays so."""
        now = time.monotonic()
        if length <= self._config.high:
            self._hook_called_at = -_HOOK_AGAIN_S
        elif self._hook and now - self._hook_called_at >= _HOOK_AGAIN_S:
            self._hook_called_at = now
            self._hook.call(length, len(self._writers))

    def _resize(self, size: int) -> None:
        self._writers += [self._start(slot) for slot in range(len(self._writers), size)]
        ending, self._writers = self._writers[size:], self._writers[:size]
        _end(ending)

    def _name(self, slot: int) -> str:
        """Stays the same over restarts of the process: so the next one finds what the last had taken."""
        return f"{socket.gethostname()}-{slot}"

    def _start(self, slot: int) -> subprocess.Popen[bytes]:
        told = {
            "name": self._name(slot),
            "queue": self._queue.uri,
            "store": self._store_uri,
            "config": self._config.model_dump(mode="json"),
        }
        # -P: not from the working directory, whatever is called `redis` there. A session of its own: Ctrl-C is for us.
        command = [sys.executable, "-P", "-m", "agl.queue"]
        writer = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        assert writer.stdin is not None
        with suppress(BrokenPipeError):  # Dead already: it is replaced.
            writer.stdin.write(json.dumps(told).encode() + b"\n")
            writer.stdin.flush()
        return writer


def _end(writers: list[subprocess.Popen[bytes]]) -> None:
    for writer in writers:
        assert writer.stdin is not None
        with suppress(BrokenPipeError):
            writer.stdin.close()
    deadline = time.monotonic() + _GRACE_S
    for writer in writers:
        try:
            writer.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            writer.kill()
            writer.wait()
