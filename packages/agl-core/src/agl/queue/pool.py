"""The writer pool: processes that each run a writer, more of them while the queue is long."""

import json
import logging
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Final, Self

from agl.config.queue import QueueConfig
from agl.errors import ConfigError, QueueError
from agl.queue.hook import QueueHook
from agl.queue.queue import SpanQueue
from agl.secret_url import SecretUrl

logger = logging.getLogger(__name__)

_STOP_TIMEOUT_S: Final = 10.0
_HOOK_INTERVAL_S: Final = 60.0


def next_size(size: int, length: int, calm_s: float, config: QueueConfig) -> int:
    """Number of writers for a queue of this length that has been at most half of `config.high` for `calm_s` seconds."""
    if length > config.high:
        return min(size + 1, config.max_writers)
    if calm_s >= config.shrink_after_s:
        return max(size - 1, config.min_writers)
    return size


class WriterPool:
    """Writers from `queue` to the store at `store_uri`: `min_writers` at first, adapted every `check_s` seconds.

    With `samples` production spans wait in the store for the decision of sampling. A writer that dies is replaced by
    one with the same name. `stop` leaves unwritten spans in the queue. Raises ConfigError for a store that other
    processes cannot open.
    """

    def __init__(
        self, queue: SpanQueue, store_uri: str, config: QueueConfig | None = None, *, samples: bool = False
    ) -> None:
        if store_uri.startswith("memory:"):
            raise ConfigError(
                f"the store {store_uri} is in the memory of this process, and writers are processes of their own;"
                " use sqlite:///path.db, for example"
            )
        self._queue = queue
        self._store_uri = SecretUrl(store_uri)
        self._samples = samples
        self._config = config or QueueConfig()
        self._hook = QueueHook(self._config.on_queue_high) if self._config.on_queue_high else None
        self._hook_called_at = -_HOOK_INTERVAL_S
        self._calm_since = time.monotonic()
        self._writers: list[subprocess.Popen[bytes]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._supervise, name="agl-writer-pool", daemon=True)

    @property
    def pids(self) -> list[int]:
        """Process ids of the running writers."""
        return [writer.pid for writer in self._writers if writer.poll() is None]

    def start(self) -> None:
        self._resize(self._config.min_writers)
        self._thread.start()

    def stop(self) -> None:
        """End the writers, each after its current commit."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._resize(0)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _supervise(self) -> None:
        while not self._stop.wait(self._config.check_s):
            self._replace_dead()
            try:
                length = self._queue.length()
            except QueueError as error:
                logger.warning("cannot read the length of the queue: %s", error)
                continue
            self._adapt(length)
            self._call_hook(length)

    def _replace_dead(self) -> None:
        for slot, writer in enumerate(self._writers):
            if writer.poll() is not None:
                logger.warning("writer %s ended with exit code %s and is replaced", self._name(slot), writer.returncode)
                _end([writer])
                self._writers[slot] = self._start(slot)

    def _adapt(self, length: int) -> None:
        now, size = time.monotonic(), len(self._writers)
        if length > self._config.high // 2:
            self._calm_since = now
        wanted = next_size(size, length, now - self._calm_since, self._config)
        if wanted != size:
            logger.info("%d spans in the queue: %d writers instead of %d", length, wanted, size)
            self._calm_since = now
            self._resize(wanted)

    def _call_hook(self, length: int) -> None:
        """Call the hook when the queue gets longer than `high`, and every minute while it stays so."""
        now = time.monotonic()
        if length <= self._config.high:
            self._hook_called_at = -_HOOK_INTERVAL_S
        elif self._hook and now - self._hook_called_at >= _HOOK_INTERVAL_S:
            self._hook_called_at = now
            self._hook.call(length, len(self._writers))

    def _resize(self, size: int) -> None:
        self._writers += [self._start(slot) for slot in range(len(self._writers), size)]
        ending, self._writers = self._writers[size:], self._writers[:size]
        _end(ending)

    def _name(self, slot: int) -> str:
        """Consumer name, the same after a restart of the process: the new one finds the entries of the old one."""
        return f"{socket.gethostname()}-{slot}"

    def _start(self, slot: int) -> subprocess.Popen[bytes]:
        settings = {
            "name": self._name(slot),
            "queue": self._queue.uri.secret,
            "store": self._store_uri.secret,
            "samples": self._samples,
            "config": self._config.model_dump(mode="json", exclude={"on_queue_high"}),
        }
        # -P: do not import a `redis.py` of the working directory. A new session: Ctrl-C is for the parent only.
        command = [sys.executable, "-P", "-m", "agl.queue"]
        writer = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        assert writer.stdin is not None
        with suppress(BrokenPipeError):  # It has died; `_replace_dead` replaces it.
            writer.stdin.write(json.dumps(settings).encode() + b"\n")
            writer.stdin.flush()
        return writer


def _end(writers: list[subprocess.Popen[bytes]]) -> None:
    for writer in writers:
        assert writer.stdin is not None
        with suppress(BrokenPipeError):
            writer.stdin.close()
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    for writer in writers:
        try:
            writer.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            writer.kill()
            writer.wait()
