"""Upper bounds on the ingest rate of one process without a server: one core, one commit per request body."""

import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from benchmarks.corpus import Body

Row = tuple[bytes, bytes, str, int, bytes]


def measure(bodies: Sequence[Body], folder: Path) -> dict[str, float]:
    """Spans per second of three programs.

    `parse` parses the protobuf only. `store` parses, cuts the body into rows and commits them to SQLite (WAL,
    synchronous FULL, a unique index on the ids). `append` writes each body to a file and calls fsync.
    """
    spans = sum(count for count, _ in bodies)
    return {floor.__name__: spans / _time(floor, bodies, folder) for floor in (parse, store, append)}


def parse(bodies: Sequence[Body], _: Path) -> None:
    for _, body in bodies:
        ExportTraceServiceRequest.FromString(body)


def store(bodies: Sequence[Body], folder: Path) -> None:
    with closing(sqlite3.connect(folder / "floor.db", isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("CREATE TABLE spans (span_id BLOB, trace_id BLOB, name TEXT, start_ns INTEGER, otlp BLOB)")
        db.execute("CREATE UNIQUE INDEX spans_by_id ON spans (trace_id, span_id)")
        for _, body in bodies:
            rows = _rows(body)
            db.execute("BEGIN IMMEDIATE")
            db.executemany("INSERT INTO spans VALUES (?, ?, ?, ?, ?)", rows)
            db.execute("COMMIT")


def append(bodies: Sequence[Body], folder: Path) -> None:
    with (folder / "floor.log").open("wb", buffering=0) as log:
        for _, body in bodies:
            log.write(body)
            os.fsync(log.fileno())


def _rows(body: bytes) -> list[Row]:
    return [
        (span.span_id, span.trace_id, span.name, span.start_time_unix_nano, span.SerializeToString())
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def _time(floor: Callable[[Sequence[Body], Path], None], bodies: Sequence[Body], folder: Path) -> float:
    begin = time.perf_counter()
    floor(bodies, folder)
    took_s = time.perf_counter() - begin
    for left in folder.glob("floor.*"):
        left.unlink()
    return took_s
