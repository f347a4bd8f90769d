"""SQLite only: files, migrations, the index of requested responses, damage and backups."""

import hashlib
import itertools
import sqlite3
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from agl import otlp, semconv
from agl.errors import InputError, StoreError
from agl.span import Span
from agl.store import AttemptState, Resource, Rollout, RolloutState, open_store
from agl.store.span_row import SpanRow
from agl.store.sql.database import write_many
from agl.store.sqlite import maintenance, spans
from agl.store.sqlite.database import SqliteDatabase
from agl.store.sqlite.schema import MIGRATIONS
from tests.store.spans import OTHER_TRACE, TRACE, answered, asked, make_span, numbers


def test_every_memory_store_is_its_own() -> None:
    with closing(open_store("memory://")) as first, closing(open_store("memory://")) as second:
        first.append_spans([make_span(1)])
        assert second.count_spans() == 0


def test_a_file_is_made_with_its_folders(tmp_path: Path) -> None:
    open_store(f"sqlite:///{tmp_path}/deep/er/agl.db").close()
    assert (tmp_path / "deep/er/agl.db").exists()


@pytest.mark.parametrize("content", [b"this is a text file, not a database" * 50, None])
def test_a_file_that_is_not_a_store_is_rejected_and_not_changed(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "shop.db"
    if content is None:
        with sqlite3.connect(path) as other:
            other.execute("CREATE TABLE orders (id INTEGER)")
        other.close()
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"shop\.db"):
        open_store(f"sqlite:///{path}")
    assert path.read_bytes() == before


def test_a_newer_schema_is_rejected(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/agl.db"
    open_store(uri).close()
    with sqlite3.connect(tmp_path / "agl.db") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(StoreError, match="schema version 99"):
        open_store(uri)


def test_uris_that_name_no_store_are_rejected() -> None:
    with pytest.raises(StoreError, match="mysql"):
        open_store("mysql://host/db")
    with pytest.raises(StoreError, match="names no file"):
        open_store("sqlite:///")


def test_values_that_sqlite_cannot_store_raise_input_error_and_affect_no_others() -> None:
    with closing(open_store("memory://")) as store:
        for version in (2**70, "\ud800"):
            with pytest.raises(InputError, match="can never keep this"):
                store.put_resource(Resource("w", version, "u"))  # pyright: ignore[reportArgumentType] - on purpose
        store.put_resource(Resource("w", 1, "u"))
        assert store.get_resource("w") == Resource("w", 1, "u")


def test_threads_that_write_the_same_statement_do_not_disturb_each_other(tmp_path: Path) -> None:
    """A cursor that left the writer's thread was freed in the caller's while the next change used its statement."""
    table = ("CREATE TABLE pairs (a, b)",)
    with closing(SqliteDatabase(f"{tmp_path}/pairs.db", (table,))) as database, ThreadPoolExecutor(4) as threads:
        changes = [[(number, place) for place in range(8)] for number in range(1000)]
        list(threads.map(partial(write_many, database, "INSERT INTO pairs VALUES (?, ?)"), changes))
        assert database.read(lambda db: db.execute("SELECT count(*) FROM pairs").fetchone()) == (8_000,)


@pytest.mark.parametrize("way", ["read", "write"])
def test_no_cursor_outlives_its_transaction(tmp_path: Path, way: str) -> None:
    table = ("CREATE TABLE numbers (a)", "INSERT INTO numbers VALUES (1), (2)")
    query = "SELECT a FROM numbers"
    with closing(SqliteDatabase(f"{tmp_path}/numbers.db", (table,))) as database:
        run = getattr(database, way)
        with pytest.raises(TypeError, match="return a list"):
            run(lambda db: db.execute(query))
        with pytest.raises(TypeError, match="return a list"):
            run(lambda db: (a for (a,) in db.execute(query)))
        with pytest.raises(ZeroDivisionError) as raised:
            run(lambda db: [1 // (a - a) for (a,) in db.execute(query)])
        frames = list(traceback.walk_tb(raised.value.__traceback__))
        assert not [
            value for frame, _ in frames for value in frame.f_locals.values() if isinstance(value, sqlite3.Cursor)
        ]
        assert run(lambda db: db.execute(query).fetchall()) == [(1,), (2,)]


# --- Files of older versions -----------------------------------------------------------------------------------------

OLD_SPANS = (
    (TRACE, 1, "r1", "a", None),
    (TRACE, 2, TRACE, None, None),  # It names no rollout.
    (OTHER_TRACE, 3, OTHER_TRACE, None, "a"),  # The gateway's, without a parent.
)


def make_old_file(path: Path, version: int) -> None:
    """A file with spans and rollouts in the schema of that version."""
    SqliteDatabase(str(path), MIGRATIONS[:version]).close()
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        for trace, number, rollout, response, answer in OLD_SPANS:
            span = answered(number, "a", trace=trace) if answer else make_span(number, trace=trace, start_ns=number)
            span = asked(number, response, rollout=rollout, start_ns=number) if response else span
            row = (bytes.fromhex(trace), number.to_bytes(8, "big"), rollout, number, SpanRow.of(span).otlp)
            db.execute("INSERT INTO spans (trace_id, span_id, rollout_id, start_ns, otlp) VALUES (?, ?, ?, ?, ?)", row)
            if version > 1:
                key = (response, answer, number.to_bytes(8, "big"))
                db.execute("UPDATE spans SET asked = ?, answered = ? WHERE span_id = ?", key)
        for name, state in (("done", "succeeded"), ("cancelled", "cancelled"), ("queued", "queued")):
            row = (name, '{"n": 1}', "g", "train", 2, state, "{}")
            db.execute(
                "INSERT INTO rollouts (rollout_id, input, group_id, mode, max_attempts, state, metadata)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                row,
            )
        for name, state, ended_ns in (("done", "succeeded", 7), ("cancelled", "running", None)):
            row = (f"{name}-a1", name, state, ended_ns)
            db.execute("INSERT INTO attempts VALUES (?, ?, 1, 'worker', ?, 5, 6, ?, NULL)", row)


@pytest.mark.parametrize("version", [1, 2])
def test_attempts_and_limits_of_a_file_without_them_are_added(tmp_path: Path, version: int) -> None:
    make_old_file(tmp_path / "agl.db", version)
    with closing(open_store(f"sqlite:///{tmp_path}/agl.db")) as store:
        assert numbers(store.query_spans("r1")) == [1, 2, 3]
        assert store.last_rollout_id() == "r1"
        assert store.append_spans([make_span(1, rollout="r1"), make_span(4, rollout="r1")]) == 1
        done, cancelled, queued = store.query_rollouts("g")
        assert (done.state, done.attempts, done.ended_ns) == (RolloutState.SUCCEEDED, 1, 7)
        assert (cancelled.state, store.query_attempts("cancelled")[0].state) == ("cancelled", "cancelled")
        assert (queued.retry_on, queued.timeout_s, queued.attempts) == (Rollout("x", 1).retry_on, None, 0)
        assert store.lease_rollout("worker") is not None
        assert store.finish_attempt("queued-a1", AttemptState.FAILED).state is RolloutState.QUEUED
    with closing(sqlite3.connect(tmp_path / "agl.db")) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)


def test_spans_of_an_older_program_are_whole_and_joined(tmp_path: Path) -> None:
    """One stored them with their media, the other has the file open while it is migrated."""
    path = tmp_path / "agl.db"
    media = {semconv.MEDIA + hashlib.sha256(b"x" * 4000).hexdigest(): b"x" * 4000}
    first, second = asked(1, "a", rollout="r1"), asked(2, "b", rollout="r2")
    insert = """INSERT INTO spans (trace_id, span_id, rollout_id, start_ns, arrived_ns, asked, otlp)
                VALUES (?, ?, ?, ?, 0, ?, ?)"""

    def store_as_before(span: Span) -> None:
        ids, asks = (bytes.fromhex(span.trace_id), bytes.fromhex(span.span_id)), (span.response_id, 0)
        write_many(old, insert, [(*ids, span.rollout_id, 0, span.response_id, otlp.encode((span,)))])
        write_many(old, "INSERT INTO new_asks VALUES (?, ?, ?, ?)", [(*asks, *ids)])

    with closing(SqliteDatabase(str(path), MIGRATIONS[:3])) as old:
        store_as_before(replace(first, attributes={**first.attributes, **media}))
        with closing(open_store(f"sqlite:///{path}")) as store:
            store_as_before(second)
            store.append_spans([answered(3, "a")])
            assert [numbers(store.query_spans(name)) for name in ("r1", "r2")] == [[1, 3], [2]]
            assert store.query_spans("r2") == [second]
    assert maintenance.check(path) == []


# --- The index of requested responses (`asks`) -----------------------------------------------------------------------


def test_a_join_works_when_asks_are_indexed_in_several_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "_ASKS_PER_STEP", 3)
    with closing(open_store(f"sqlite:///{tmp_path}/agl.db")) as store:
        store.append_spans([asked(number, f"a{number}", trace=f"{number:032x}") for number in range(1, 21)])
        store.append_spans([answered(30, "a20", rollout="r1"), answered(31, "a1", rollout="r2")])
        assert numbers(store.query_spans("r1")) == [20, 30]
        assert numbers(store.query_spans("r2")) == [1, 31]


def test_concurrent_writers_do_not_block_a_query(tmp_path: Path) -> None:
    stop = threading.Event()

    def write() -> None:
        for number in itertools.count(100):
            if stop.is_set():
                return
            store.append_spans([asked(number, f"other {number}", trace=f"{number:032x}")])

    with closing(open_store(f"sqlite:///{tmp_path}/agl.db")) as store:
        store.append_spans([asked(1, "a"), answered(2, "a", rollout="r1")])
        writers = [threading.Thread(target=write) for _ in range(3)]
        for writer in writers:
            writer.start()
        found = [numbers(store.query_spans("r1")) for _ in range(20)]
        stop.set()
        for writer in writers:
            writer.join()
    assert found == [[1, 2]] * 20


def test_a_rollout_without_gateway_calls_is_read_without_indexing_new_asks(tmp_path: Path) -> None:
    with closing(open_store(f"sqlite:///{tmp_path}/agl.db")) as store:
        store.append_spans([asked(1, "a", rollout="r1"), answered(2, "b", rollout="r2")])
        assert numbers(store.query_spans("r1")) == [1]
        with closing(sqlite3.connect(tmp_path / "agl.db")) as db:
            assert db.execute("SELECT count(*) FROM new_asks").fetchone() == (1,)
            assert numbers(store.query_spans("r2")) == [2]
            assert db.execute("SELECT count(*) FROM new_asks").fetchone() == (0,)


# --- Damage and backups ----------------------------------------------------------------------------------------------


def make_store(path: Path, spans: int = 400) -> None:
    with closing(open_store(f"sqlite:///{path}")) as store:
        store.append_spans([make_span(number, rollout="r1", text="x" * 3000) for number in range(1, spans + 1)])


def overwrite(path: Path, place: float) -> None:
    """Overwrite 64 KB, `place` of the way through the file (0 to 1)."""
    with path.open("r+b") as file:
        file.seek(int(path.stat().st_size * place) // 4096 * 4096)
        file.write(b"\xa5" * 65_536)


def test_reading_a_damaged_file_reports_the_damage(tmp_path: Path) -> None:
    path = tmp_path / "agl.db"
    make_store(path)
    assert maintenance.check(path) == []
    overwrite(path, 0.5)
    assert maintenance.check(path)
    with (
        closing(open_store(f"sqlite:///{path}")) as store,
        pytest.raises(StoreError, match=r"agl\.db cannot be read: .*damaged.*restore a backup.*agl store check"),
    ):
        store.query_spans("r1")


def test_a_file_with_a_damaged_header_is_rejected_with_advice(tmp_path: Path) -> None:
    path = tmp_path / "agl.db"
    make_store(path)
    overwrite(path, 0)
    with pytest.raises(StoreError, match=r"agl\.db: .*restore a backup"):
        open_store(f"sqlite:///{path}")
    assert maintenance.check(path)
    with pytest.raises(StoreError, match=r"agl\.db"):
        maintenance.schema_version(path)


def test_a_backup_is_consistent_while_others_write(tmp_path: Path) -> None:
    path, copy = tmp_path / "agl.db", tmp_path / "copy.db"
    make_store(path)
    stop, written = threading.Event(), [400]
    with closing(open_store(f"sqlite:///{path}")) as store:

        def write() -> None:
            while not stop.is_set():
                store.append_spans([make_span(written[0] + 1, rollout="r1")])
                written[0] += 1

        writer = threading.Thread(target=write)
        writer.start()
        before = written[0]
        maintenance.backup(path, copy)
        after = written[0]
        stop.set()
        writer.join()
    assert maintenance.check(copy) == []
    with closing(open_store(f"sqlite:///{copy}")) as store:
        found = numbers(store.query_spans("r1"))
    assert found == list(range(1, len(found) + 1))
    assert before <= len(found) <= after + 1
    with pytest.raises(StoreError, match="there already"):
        maintenance.backup(path, copy)


def test_a_backup_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "agl.db"
    make_store(path)
    overwrite(path, 0)
    with pytest.raises(StoreError, match="cannot back up"):
        maintenance.backup(path, tmp_path / "copy.db")
    assert sorted(file.name for file in tmp_path.iterdir() if "copy" in file.name) == []


def test_gc_gives_the_space_back(tmp_path: Path) -> None:
    path = tmp_path / "agl.db"
    make_store(path)
    with closing(open_store(f"sqlite:///{path}")) as store:
        before = path.stat().st_size
        collected = store.gc(older_than_s=1, now_ns=time.time_ns() + 10**15)
    assert collected.spans == 400
    assert path.stat().st_size < before / 2
    assert maintenance.check(path) == []
