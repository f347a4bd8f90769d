"""Listens for the server's notifications that rollouts have ended, in whichever process."""

import logging
import threading
from typing import Final

import psycopg

from agl.store.end_notifier import EndNotifier
from agl.store.postgres.database import ENDS_CHANNEL, PostgresDatabase

_CHECK_S: Final = 0.5
"""Interval at which the thread checks whether it must stop, and reconnects while the server is down."""

_log = logging.getLogger(__name__)


class Listener:
    """Passes the notifications on to `ends`, from a thread and a connection of its own that `start` opens."""

    def __init__(self, database: PostgresDatabase, ends: EndNotifier) -> None:
        self._database = database
        self._ends = ends
        self._stop = threading.Event()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to listen, if it does not listen yet."""
        with self._starting:
            if self._thread is None and not self._stop.is_set():
                self._thread = threading.Thread(target=self._run, name="agl-store endings", daemon=True)
                self._thread.start()

    def close(self) -> None:
        self._stop.set()
        with self._starting:
            if self._thread is not None:
                self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._listen()
            except psycopg.Error:
                _log.warning("the PostgreSQL server is down: ends of rollouts are polled; connecting again")
                self._stop.wait(_CHECK_S)

    def _listen(self) -> None:
        with self._database.connect() as connection:
            connection.execute(f"LISTEN {ENDS_CHANNEL}")
            self._ends.notify()  # For ends before the LISTEN.
            while not self._stop.is_set():
                for _ in connection.notifies(timeout=_CHECK_S, stop_after=1):
                    self._ends.notify()
