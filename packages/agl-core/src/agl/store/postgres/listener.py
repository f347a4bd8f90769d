"""Hears from the server that rollouts have ended, whichever process ended them."""

import logging
import threading
from typing import Final

import psycopg

from agl.store.postgres.database import Database
from agl.store.postgres.rollouts import ENDINGS
from agl.store.waiting import Endings

_LOOK_EVERY_S: Final = 0.5
"""How often it looks whether it is to stop, and tries again while the server is away."""

_log = logging.getLogger(__name__)


class Listener:
    """Announces endings from a thread and a connection of its own, which begin with the first who waits."""

    def __init__(self, database: Database, endings: Endings) -> None:
        self._database = database
        self._endings = endings
        self._stop = threading.Event()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to listen, unless it has begun."""
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
                _log.warning("waiting for rollouts without word from the server: it is away; trying again")
                self._stop.wait(_LOOK_EVERY_S)

    def _listen(self) -> None:
        with self._database.connect() as connection:
            connection.execute(f"LISTEN {ENDINGS}")
            self._endings.announce()  # What ended before this was not heard.
            while not self._stop.is_set():
                for _ in connection.notifies(timeout=_LOOK_EVERY_S, stop_after=1):
                    self._endings.announce()
