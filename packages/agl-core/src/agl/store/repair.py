"""Repairs a store on a server: damaged rollouts and rows are set aside in files, and deleted from the store."""

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from agl import semconv
from agl.errors import StoreError
from agl.span import Span
from agl.store.protocol import Store
from agl.store.span_row import parse
from agl.store.sqlite.store import SqliteStore

SpanId = tuple[bytes, bytes]
"""Trace and span id."""
Keep = Callable[[str, Sequence[Any]], None]
"""Keeps a damaged row, with a line about it, before it is deleted."""


@runtime_checkable
class Repairable(Store, Protocol):
    """A store in a database on a server."""

    def delete_spans(self, rollout_id: str, damaged: Sequence[SpanId]) -> None:
        """Delete the spans of a rollout, except those that belong to another rollout too, and these damaged ones."""
        ...

    def delete_damaged_rows(self, keep: Keep) -> None:
        """Delete the rows of `damaged_rows`, each after `keep` has returned."""
        ...


def damaged_spans(store: Store, rollout_id: str) -> list[Span]:
    """The spans that the store returns in the place of damaged ones."""
    return [span for span in store.query_spans(rollout_id) if span.name == semconv.SPAN_DAMAGED]


def repair_server(store: Repairable, spans: Path, rows: Path) -> list[str]:
    """Move what is damaged into the SQLite store `spans` and the JSON lines `rows`; returns a line for each finding.

    What an earlier repair has set aside stays. Raises StoreError if a file cannot be written.
    """
    findings: list[str] = []
    damaged: dict[str, list[SpanId]] = {}
    for rollout_id in store.rollout_ids():
        if found := damaged_spans(store, rollout_id):
            findings.append(f"rollout {rollout_id}: {len(found)} of its spans damaged")
            damaged[rollout_id] = [(bytes.fromhex(span.trace_id), bytes.fromhex(span.span_id)) for span in found]
    if damaged:
        with closing(SqliteStore(str(spans), uri=f"sqlite:///{spans}")) as aside:
            # All before the first deletion: a trace may belong to several of them.
            for rollout_id in damaged:
                aside.append_rows(parse(b"".join(store.query_rows(rollout_id))).rows)
        for rollout_id, ids in damaged.items():
            store.delete_spans(rollout_id, ids)

    def keep(finding: str, row: Sequence[Any]) -> None:
        findings.append(finding)
        with rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"finding": finding, "row": list(row)}, default=str) + "\n")

    try:
        store.delete_damaged_rows(keep)
    except OSError as error:
        raise StoreError(f"cannot set damaged rows aside in {rows}: {error}") from error
    return findings
