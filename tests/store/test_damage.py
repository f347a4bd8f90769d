"""Damage: found by checksum on every backend; in a SQLite file also found by `check`, and repaired."""

import json
import os
import random
import re
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from agl import semconv
from agl.cli import main
from agl.errors import StoreError
from agl.span import Span
from agl.store import AttemptState, Resource, Rollout, Store, open_store
from agl.store.files import digest_of
from agl.store.sql.damage import TABLES
from agl.store.sqlite import maintenance
from agl.store.sqlite.repair import repair
from agl.trajectory import DropReason, build_trajectory
from tests.store.spans import answered, asked, make_span, numbers

ROLLOUTS = 12


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file with spans of rollouts that are named, joined, or only traces."""
    path = tmp_path_factory.mktemp("sound") / "agl.db"
    with closing(open_store(f"sqlite:///{path}")) as store:
        for number in range(1, 10 * ROLLOUTS):
            rollout, size = number % ROLLOUTS, random.Random(number).choice([10, 800, 20_000])
            name = f"r{rollout}" if rollout % 3 else None
            span = make_span(number, trace=f"{rollout + 1:032x}", rollout=name, start_ns=number, text="x" * size)
            store.append_spans([span])
        for rollout in range(1, ROLLOUTS):
            store.append_spans(
                [asked(1000 + rollout, f"a{rollout}", rollout=f"r{rollout}", trace=f"{rollout + 1:032x}")]
            )
            store.append_spans([answered(2000 + rollout, f"a{rollout}", trace=f"{99 + rollout:032x}")])
        store.enqueue_rollouts([Rollout("queued", {"q": 1})])
    return path.read_bytes()


def all_spans(path: Path) -> dict[str, list[Span]]:
    with closing(open_store(f"sqlite:///{path}")) as store:
        return {rollout_id: store.query_spans(rollout_id) for rollout_id in store.rollout_ids()}


def is_traced(spans: list[Span]) -> bool:
    """Whether one of the spans is the store's own, in the place of a damaged one."""
    return any(span.name == semconv.SPAN_DAMAGED for span in spans)


def damage(path: Path, sound: bytes, seed: int) -> None:
    """Overwrite some bytes at a random place."""
    luck, changed = random.Random(seed), bytearray(sound)
    size = luck.choice([1, 8, 64, 4096])
    place = luck.randrange(100, len(changed) - size)
    changed[place : place + size] = luck.randbytes(size)
    path.write_bytes(changed)


@pytest.mark.parametrize("seeds", [range(0, 12), range(12, 24)])
def test_random_damage_is_found_and_repaired(tmp_path: Path, sound: bytes, seeds: range) -> None:
    (tmp_path / "sound.db").write_bytes(sound)
    expected = all_spans(tmp_path / "sound.db")
    for seed in seeds:
        path = tmp_path / f"{seed}.db"
        damage(path, sound, seed)
        found = maintenance.check(path)
        try:
            read = all_spans(path)
        except StoreError:
            assert found, seed
        else:
            assert found or read == expected, seed
        if not found:
            continue
        with pytest.raises(StoreError):
            maintenance.backup(path, tmp_path / "copy.db")
        repaired = repair(path)
        assert repaired is not None and maintenance.check(path) == [], seed
        left, aside = all_spans(path), all_spans(repaired.set_aside)
        for name, spans in expected.items():
            is_aside = name in repaired.damage.rollouts
            assert is_aside or left.get(name) == spans or name == f"{int(name, 16):032x}", (seed, name)
            assert not is_aside or is_traced(aside[name]), (seed, name)
        assert repaired.damaged.exists()


def test_a_damaged_span_is_named_on_reading_and_keeps_its_rollout_from_training(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    call = answered(2, "a", rollout="r1")
    store.append_spans([make_span(1, rollout="r1"), call, make_span(4, rollout="r2")])
    with monkeypatch.context() as other:  # The checksum of other bytes than those that are stored.
        for backend in ("sqlite", "postgres", "cassandra"):
            other.setattr(f"agl.store.{backend}.spans.checksum", lambda body: 7)
        store.append_spans([make_span(3, rollout="r1", start_ns=5)])
    spans = store.query_spans("r1")
    assert [span.name for span in spans] == ["span 1", semconv.SPAN_GATEWAY_CALL, semconv.SPAN_DAMAGED]
    assert numbers(spans) == [1, 2, 3]
    (drop,) = build_trajectory(spans).drops
    assert (drop.reason, drop.detail[:36]) == (DropReason.DAMAGED, "the store no longer has 1 of the rol")
    assert numbers(store.query_spans("r2")) == [4]
    assert "span 0000000000000003 of rollout r1 is damaged" in caplog.text


def test_check_names_the_damaged_rollouts_of_a_store_on_a_server(
    shared_uri: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(open_store(shared_uri)) as store, monkeypatch.context() as other:
        store.append_spans([make_span(1, rollout="sound")])
        assert main(["store", "check", "--store", shared_uri]) == 0
        for backend in ("sqlite", "postgres", "cassandra"):
            other.setattr(f"agl.store.{backend}.spans.checksum", lambda body: 7)
        store.append_spans([make_span(2, rollout="broken")])
    assert main(["store", "check", "--store", shared_uri]) == 1
    assert "rollout broken: 1 of its spans damaged" in capsys.readouterr().out


def test_repair_sets_aside_what_is_damaged_in_any_store(
    shared_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, repair_it = f"{9:032x}", ["store", "repair", "--store", shared_uri]
    monkeypatch.chdir(tmp_path)
    with closing(open_store(shared_uri)) as store, monkeypatch.context() as other:
        store.append_spans([make_span(1, rollout="sound"), make_span(3, rollout="broken", trace=trace)])
        for place in ("sqlite.spans", "postgres.spans", "cassandra.spans", "mapping"):
            other.setattr(f"agl.store.{place}.checksum", lambda body: 7)
        store.append_spans([make_span(2, rollout="broken", trace=trace), make_span(4, trace=trace)])
        store.enqueue_rollouts([Rollout("row", {"q": 1})])
        store.put_resource(Resource("run/a", 1, "file:///a"))
    if shared_uri.startswith("http"):
        assert main(repair_it) == 2 and "is no database: name the store itself" in capsys.readouterr().err
        return
    assert main(repair_it) == 0
    printed = capsys.readouterr().out
    assert "rollout broken: 2 of its spans damaged" in printed
    assert {"the row of rollout row is damaged", "the row of resource run/a@1 is damaged"} <= {*printed.splitlines()}
    with closing(open_store(shared_uri)) as store:
        assert numbers(store.query_spans("sound")) == [1] and store.query_spans("broken") == []
        assert store.get_rollout("row") is store.get_resource("run/a") is None
    (aside,) = re.findall(r"sqlite:///\S+set-aside\S*", printed)
    with closing(open_store(aside)) as store:
        found = store.query_spans("broken")
        assert 3 in numbers(found) and is_traced(found)
    if not shared_uri.startswith("sqlite"):
        rows = [json.loads(line) for line in next(tmp_path.glob("*.set-aside.jsonl")).read_text().splitlines()]
        assert sorted(row["row"][0] for row in rows) == ["row", "run/a"]
    assert main(["store", "check", "--store", shared_uri]) == main(repair_it) == 0


def test_rows_that_are_not_what_was_stored_are_named_on_every_backend(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.enqueue_rollouts([Rollout("a", {"q": "é"}, timeout_s=30, max_attempts=2)])
    store.put_resource(Resource("run/a", 1, "file:///a", {"n": 1}))
    leased = store.lease_rollout("worker")
    assert leased is not None
    store.finish_attempt(leased[1].attempt_id, AttemptState.FAILED, "it broke")
    assert store.lease_rollout("worker") and store.damaged_rows() == []
    with monkeypatch.context() as other:  # The checksum of other values than those that are stored.
        other.setattr("agl.store.mapping.checksum", lambda body: 7)
        store.enqueue_rollouts([Rollout("b", 1), Rollout("c", 2)])
        store.put_resource(Resource("run/b", 2, "file:///b"))
    assert store.lease_rollout("worker", "b")
    assert sorted(store.damaged_rows()) == [
        "the row of resource run/b@2 is damaged",
        "the row of rollout b is damaged",
        "the row of rollout c is damaged",
    ]
    with monkeypatch.context() as other:
        other.setattr("agl.store.mapping.checksum", lambda body: 7)
        store.cancel_rollouts(["a"])
    damaged = {"the row of attempt a-a2 is damaged", "the row of rollout a is damaged"}
    assert damaged < {*store.damaged_rows()}


def test_a_change_of_any_column_of_a_row_is_found_and_repaired(tmp_path: Path) -> None:
    with closing(open_store(f"sqlite:///{tmp_path / 'sound.db'}")) as store:
        store.enqueue_rollouts([Rollout("a", {"q": 1}, group_id="g", timeout_s=30, unresponsive_s=9)])
        leased = store.lease_rollout("worker")
        assert leased is not None
        store.finish_attempt(leased[1].attempt_id, AttemptState.FAILED, "it broke")
        store.put_resource(Resource("run/a", 1, "file:///a", {"n": 1}))
        store.put_resource_part("run/a", 1, digest_of(b"part"), b"part")
    for table in TABLES:
        for column in table.columns.split(", "):
            if column == "heartbeat_ns" or (table.name == "resource_parts" and column in ("name", "version")):
                continue
            path = tmp_path / f"{table.name}-{column}.db"
            path.write_bytes((tmp_path / "sound.db").read_bytes())
            with closing(sqlite3.connect(path)) as db, db:
                (value,) = db.execute(f"SELECT {column} FROM {table.name}").fetchone()
                changed = b"port" if value == b"part" else value
                if isinstance(value, str):
                    changed = f"{value[:-1]}{chr(ord(value[-1]) ^ 1)}"
                elif isinstance(value, int | float):
                    changed = value + 1
                db.execute(f"UPDATE {table.name} SET {column} = ?", (changed,))
            found = maintenance.check(path)
            assert len(found) == 1 and found[0].startswith(f"the row of {table.name[:-1].replace('_', ' ')} "), (
                path.name,
                found,
            )
            assert repair(path) is not None and maintenance.check(path) == []


def test_a_damaged_rollout_is_set_aside_with_all_that_is_joined_to_it(
    tmp_path: Path, sound: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agl.store.sqlite.spans._ASKS_PER_STEP", 1)
    path = tmp_path / "agl.db"
    path.write_bytes(sound)
    path.chmod(0o600)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE spans SET checksum = checksum + 1 WHERE span_id = ?", ((10).to_bytes(8, "big"),))
    repaired = repair(path)
    assert repaired is not None and [*repaired.damage.rollouts] == ["r10"]
    left, aside = all_spans(path), all_spans(repaired.set_aside)
    assert {1010, 2010} <= set(numbers(aside["r10"]))
    assert not {10, 1010, 2010} & {number for spans in left.values() for number in numbers(spans)}
    assert [file.stat().st_mode & 0o777 for file in (path, repaired.set_aside)] == [0o600] * 2


def test_repair_refuses_a_file_that_is_open(tmp_path: Path, sound: bytes) -> None:
    path = tmp_path / "agl.db"
    path.write_bytes(sound)
    with closing(open_store(f"sqlite:///{path}")) as store:
        store.append_spans([make_span(1)])
        with pytest.raises(StoreError, match=r"another program has .* open: end it"):
            repair(path)
    assert repair(path) is None
    assert sorted(file.name for file in tmp_path.iterdir()) == ["agl.db"]


def test_a_file_that_cannot_be_written_can_be_read_and_is_not_called_damaged(
    sound: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    with tempfile.TemporaryDirectory() as name, locked(Path(name), sound) as path:
        uri = f"sqlite:///{path}"
        assert main(["store", "check", "--store", uri]) == 0
        assert main(["store", "count", "--store", uri]) == 0
        with closing(open_store(uri)) as store:
            assert {2001, 1001} <= set(numbers(store.query_spans("r1")))  # Joined by a response.
            with pytest.raises(StoreError, match="read-only"):
                store.append_spans([make_span(1)])
        assert "damaged" not in capsys.readouterr().out


@contextmanager
def locked(folder: Path, content: bytes) -> Iterator[Path]:
    """A file in a folder, neither of which this process can write meanwhile."""
    path, user = folder / "agl.db", os.geteuid()
    path.write_bytes(content)
    path.chmod(0o444)
    folder.chmod(0o555)
    if user == 0:
        os.seteuid(65534)  # Root may write everything.
    try:
        yield path
    finally:
        os.seteuid(user)
        folder.chmod(0o755)
