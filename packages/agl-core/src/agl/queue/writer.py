"""The writer: moves spans from the queue into the store, and deletes them from the queue after the commit."""

import logging
import threading
import time
from collections.abc import Sequence
from typing import Final

from agl.config.queue import QueueConfig
from agl.config.section import DEFAULT_PROJECT
from agl.errors import AglError, InputError, OtlpError, StoreError
from agl.queue.queue import MAX_ENTRIES, Entry, SpanQueue
from agl.store import Store, open_store
from agl.store.project import uri_of_project
from agl.store.span_row import SpanRow, parse
from agl.store.traffic import Intake, intake_of

logger = logging.getLogger(__name__)

_RETRY_S: Final = 1.0
_GROUP_COMMIT_S: Final = 0.05
"""Pause between two reads while it keeps up: the spans that arrive meanwhile share a commit, and a disk flush."""


class Writer:
    """The consumer `name` of `queue`. It goes on with the unfinished entries of an earlier consumer of that name.

    `store` is that of the default project; those of others, beside it, are opened when a span of theirs comes.
    """

    def __init__(
        self, name: str, queue: SpanQueue, store: Store, config: QueueConfig, *, samples: bool = False
    ) -> None:
        self._name = name
        self._queue = queue
        self._stores = {DEFAULT_PROJECT: store}
        self._samples = samples
        self._claim_after_s = config.claim_after_s
        self._claimed_at = time.monotonic()
        self._has_unfinished = True
        self._keeps_up = False

    def run(self, stop: threading.Event) -> None:
        """Move spans until `stop`. After a StoreError they stay in the queue, and it retries."""
        while not stop.is_set():
            try:
                self.move()
                if self._keeps_up:
                    stop.wait(_GROUP_COMMIT_S)
            except StoreError as error:
                self._has_unfinished = True
                logger.warning("spans stay in the queue, and are written again later: %s", error)
                stop.wait(_RETRY_S)

    def close(self) -> None:
        """Close the stores that it opened."""
        for project, store in self._stores.items():
            if project != DEFAULT_PROJECT:
                store.close()

    def _sink_of(self, project: str) -> Store | Intake:
        if project not in self._stores:
            self._stores[project] = open_store(uri_of_project(self._stores[DEFAULT_PROJECT].uri, project).secret)
        store = self._stores[project]
        return intake_of(store) if self._samples else store

    def move(self) -> int:
        """Move the entries of one read of the queue in one commit for each project; returns the number of spans.

        Raises StoreError.
        """
        entries = self._take()
        self._keeps_up = len(entries) < MAX_ENTRIES
        rows_of = {entry: self._rows(entry) for entry in entries}
        of_project: dict[str, list[SpanRow]] = {}
        for entry, rows in rows_of.items():
            of_project.setdefault(entry.project, []).extend(rows)
        try:
            for project, rows in of_project.items():
                self._sink_of(project).append_rows(rows)
        except InputError:
            return sum(self._move_entry(entry, rows) for entry, rows in rows_of.items())
        if entries:
            self._queue.finish(entries)
        return sum(map(len, rows_of.values()))

    def _move_entry(self, entry: Entry, rows: Sequence[SpanRow]) -> int:
        """Move one entry after the store rejected several of them together."""
        try:
            self._sink_of(entry.project).append_rows(rows)
        except InputError as error:
            self._set_aside(entry, error)
            return 0
        self._queue.finish([entry])
        return len(rows)

    def _take(self) -> Sequence[Entry]:
        if self._has_unfinished:
            entries = self._queue.take_unfinished(self._name)
            self._has_unfinished = bool(entries)
            if entries:
                return entries
        if time.monotonic() - self._claimed_at >= self._claim_after_s:
            entries = self._queue.claim(self._name)
            if entries:
                return entries
            self._claimed_at = time.monotonic()
        return self._queue.take(self._name)

    def _rows(self, entry: Entry) -> Sequence[SpanRow]:
        try:
            return parse(entry.otlp).rows
        except OtlpError as error:
            self._set_aside(entry, error)
            return ()

    def _set_aside(self, entry: Entry, error: AglError) -> None:
        logger.error("%d spans of entry %s cannot be stored and are set aside: %s", entry.spans, entry.entry_id, error)
        self._queue.set_aside(entry, str(error))
