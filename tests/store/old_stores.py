"""A small store of every past schema, as the SQL that makes it: `python -m tests.store.old_stores` writes `old/`.

Each has the same spans and rollouts, with the columns that the program of that schema filled. The files stay as they
are: after a change of the schema, add the one that has become old.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agl import semconv
from agl.span import Span
from agl.store import Rollout
from agl.store.cassandra import schema as cassandra
from agl.store.mapping import ROLLOUT_ROW, from_rollout
from agl.store.postgres import schema as postgres
from agl.store.span_row import SpanRow, checksum
from agl.store.sqlite import schema as sqlite
from agl.tokens.packing import pack_ids, pack_logprobs

FOLDER = Path(__file__).with_name("old")
PAST = (
    *("sqlite-1", "sqlite-2", "sqlite-3", "sqlite-4", "sqlite-5"),
    *("postgres-1", "postgres-2", "postgres-3"),
    *("cassandra-1", "cassandra-2", "cassandra-3"),
)
_Columns = dict[str, Any]

ROLLOUTS = ("named", f"{3:032x}")
"""The rollout that a span names, and one without a name: its trace."""


def _span(number: int, trace: int, name: str, attributes: _Columns, parent: int | None = None) -> Span:
    parent_id = f"{parent:016x}" if parent else None
    return Span(f"{trace:032x}", f"{number:016x}", parent_id, name, 10**18 + number, 10**18 + number + 1, attributes)


def _call(number: int, trace: int, response: str, prompt: list[int], sampled: list[int]) -> Span:
    """A gateway call without a parent, whose answer a span of the framework names."""
    logprobs = pack_logprobs([-0.5] * len(sampled))
    tokens = {semconv.PROMPT_TOKEN_IDS: pack_ids(prompt), semconv.RESPONSE_TOKEN_IDS: pack_ids(sampled)}
    values = tokens | {semconv.RESPONSE_LOGPROBS: logprobs, semconv.GEN_AI_RESPONSE_ID: response}
    more = {semconv.GEN_AI_OPERATION_NAME: "chat", semconv.GEN_AI_RESPONSE_FINISH_REASONS: ["stop"]}
    return _span(number, trace, semconv.SPAN_GATEWAY_CALL, values | more)


def _chat(number: int, trace: int, response: str, rollout: str | None = None) -> Span:
    values: _Columns = {
        semconv.GEN_AI_OPERATION_NAME: "chat",
        semconv.GEN_AI_RESPONSE_ID: response,
        semconv.ROLE: "planner",
    }
    return _span(number, trace, "chat m", values | ({semconv.ROLLOUT_ID: rollout} if rollout else {}))


SPANS = [
    _span(1, 1, semconv.SPAN_ROLLOUT, {semconv.ROLLOUT_ID: "named"}),
    _chat(2, 1, "first", "named"),
    _call(3, 2, "first", [1, 2], [3, 4]),
    _span(4, 1, semconv.SPAN_REWARD, {semconv.REWARD_VALUE: 0.5}, 1),
    _chat(5, 3, "second"),
    _call(6, 4, "second", [5], [6]),
]


_ROLLOUT: _Columns = {"rollout_id": "named", "input": '{"n": 1}', "group_id": "g", "mode": "train", "max_attempts": 2}
_LIMITS: _Columns = {"retry_on": "failed timeout unresponsive", "metadata": "{}", "state": "queued", "attempts": 0}


_CHECKED_ROLLOUT: _Columns = dict(
    zip(
        ROLLOUT_ROW.split(", "),
        from_rollout(Rollout("named", {"n": 1}, group_id="g", mode="train", max_attempts=2)),
        strict=True,
    )
)
"""With the checksums of rows."""


def statements(name: str) -> list[str]:
    """The statements that make the store `name` of `PAST`."""
    return [each for each in (FOLDER / f"{name}.sql").read_text().split(";\n") if each.strip()]


def _sqlite(version: int) -> Iterator[str]:
    for step in sqlite.MIGRATIONS[:version]:  # What needs a function of ours reads spans, of which there are none yet.
        yield from (each for each in step if not any(f"{name}(" in each for name in sqlite.FUNCTIONS))
    for place, (row, span) in enumerate(zip(map(SpanRow.of, SPANS), SPANS, strict=True), 1):
        columns: _Columns = {"arrival": place, "trace_id": row.trace_id, "span_id": row.span_id}
        columns |= {"rollout_id": row.rollout_id or (span.trace_id if version < 3 else None), "start_ns": row.start_ns}
        if version > 1:
            columns |= {"asked": row.asked, "answered": row.answered}
        if version > 2:
            columns |= {"arrived_ns": row.start_ns}
            if row.asked:
                key = {"response_id": row.asked, "start_ns": row.start_ns}
                yield _insert("new_asks", key | {"trace_id": row.trace_id, "span_id": row.span_id}, "X'{}'")
        if version > 3:
            columns |= {"checksum": checksum(row.otlp)}
        yield _insert("spans", columns | {"otlp": row.otlp}, "X'{}'")
    rollout = _ROLLOUT | {"state": "queued", "metadata": "{}"} if version < 5 else _CHECKED_ROLLOUT
    yield _insert("rollouts", rollout, "X'{}'")
    yield "PRAGMA application_id = 0x41474C31"
    yield f"PRAGMA user_version = {version}"


def _postgres(version: int) -> Iterator[str]:
    yield "CREATE SCHEMA agl"
    yield "SET search_path TO agl"
    yield "CREATE TABLE version (version integer NOT NULL)"
    yield f"INSERT INTO version VALUES ({version})"
    for step in postgres.MIGRATIONS[:version]:
        yield from step
    yield "CREATE TABLE span_bodies_1 PARTITION OF span_bodies FOR VALUES FROM (1) TO (2)"
    for place, row in enumerate(map(SpanRow.of, SPANS), 2**24):
        key = {"arrival": place, "day": 1}
        columns = {"start_ns": row.start_ns, "arrived_ns": 86_400 * 10**9 + place, "size": len(row.otlp)}
        columns |= {"trace_id": row.trace_id, "span_id": row.span_id, "rollout_id": row.rollout_id}
        columns |= {"asked": row.asked, "answered": row.answered}
        columns |= {"checksum": checksum(row.otlp)} if version > 1 else {}
        yield _insert("spans", key | columns, "'\\x{}'")
        yield _insert("span_bodies", key | {"otlp": row.otlp}, "'\\x{}'")
    yield _insert("rollouts", _ROLLOUT | _LIMITS if version < 3 else _CHECKED_ROLLOUT, "'\\x{}'")


def _cassandra(version: int) -> Iterator[str]:
    yield "CREATE TABLE schema_version (place int PRIMARY KEY, version int, holder text)"
    yield f"INSERT INTO schema_version (place, version) VALUES (0, {version})"
    for step in cassandra.MIGRATIONS[:version]:
        yield from step
    for place, row in enumerate(map(SpanRow.of, SPANS)):
        home = row.rollout_id or row.trace_id.hex()
        key = {"home": home, "bucket": 0, "span": row.trace_id + row.span_id}
        columns: _Columns = {"start_ns": row.start_ns, "arrived_ns": 10**18 + place, "size": len(row.otlp)}
        if response := row.asked or row.answered:
            is_answer = {"is_answer": row.asked is None}
            columns |= {"response_id": response} | is_answer
            entry = {"response_id": response, "start_ns": row.start_ns, "span": key["span"], "home": home}
            arrival = {"arrived_ns": 10**18 + place} if version > 2 else {}
            yield _insert("responses", entry | is_answer | arrival, "0x{}")
        yield _insert("spans", key | columns, "0x{}")
        sums = {"checksum": checksum(row.otlp)} if version > 1 else {}
        yield _insert("span_bodies", key | sums | {"otlp": row.otlp}, "0x{}")
        if row.rollout_id:
            yield _insert("traces", {"trace_id": row.trace_id, "home": home}, "0x{}")
    yield _insert("latest", {"place": 0, "named": False, "home": f"{4:032x}"}, "0x{}")
    revision = "0d8f8a8e-8a0f-4a53-9f0c-3b8a9ff0a001"
    rollout = _ROLLOUT | _LIMITS if version < 3 else _CHECKED_ROLLOUT
    static, values = ", ".join(rollout), ", ".join(_literal(value, "0x{}") for value in rollout.values())
    yield f"INSERT INTO rollouts ({static}, revision, place) VALUES ({values}, {revision}, 1)"
    yield "INSERT INTO queue_slots (queue, slot) VALUES (0, 0)"
    yield "INSERT INTO queue (slot, place, rollout_id, number) VALUES (0, 1, 'named', 1)"
    yield "INSERT INTO rollout_groups (group_id, place, rollout_id) VALUES ('g', 1, 'named')"


def _insert(table: str, columns: dict[str, Any], blob: str) -> str:
    values = ", ".join(_literal(value, blob) for value in columns.values())
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({values})"


def _literal(value: Any, blob: str) -> str:
    if isinstance(value, bytes):
        return blob.format(value.hex())
    return "NULL" if value is None else f"'{value}'" if isinstance(value, str) else str(value)


if __name__ == "__main__":
    makers = {"sqlite": _sqlite, "postgres": _postgres, "cassandra": _cassandra}
    FOLDER.mkdir(exist_ok=True)
    for name in PAST:
        backend, _, version = name.partition("-")
        text = "".join(f"{' '.join(each.split())};\n" for each in makers[backend](int(version)))
        (FOLDER / f"{name}.sql").write_text(text)
