"""`agl serve` or its PostgreSQL killed, or its disk full, under load."""

import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from agl.store import open_store
from agl.store.sqlite import maintenance
from tests.load import SPANS, Load, check, found_at
from tests.store.postgres_server import PostgresServer, running_postgres
from tests.store.serving import serving
from tests.store.spans import make_span
from tests.waiting import wait_until


def test_a_collector_killed_twice_under_load_loses_no_acknowledged_span(tmp_path: Path) -> None:
    path, uri = tmp_path / "agl.db", f"sqlite:///{tmp_path}/agl.db"
    with Load() as load:
        for part in (SPANS // 3, SPANS * 2 // 3):
            with serving(uri) as (process, load.url):
                acknowledged = load.reach(part)
                process.kill()
            wait_until(lambda: load.refused > 0)
            assert acknowledged <= set(found_at(uri))
            assert len(load.acknowledged) < SPANS
        with serving(uri) as (_, load.url):
            load.reach(SPANS)
    assert set(load.answers) == {0, 200}
    check(load, uri)
    assert maintenance.check(path) == []


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    with running_postgres(durable=True) as server:
        yield server


def test_a_postgresql_killed_twice_under_load_loses_no_acknowledged_span(postgres: PostgresServer) -> None:
    uri = postgres.new_database()
    with serving(uri) as (_, url), Load(url) as load:
        for part in (SPANS // 3, SPANS * 2 // 3):
            acknowledged = load.reach(part)
            postgres.kill()
            wait_until(lambda: load.refused > 0)
            assert len(load.acknowledged) < SPANS
            postgres.start()
            assert acknowledged <= set(found_at(uri))
    assert set(load.answers) == {200, 503}
    check(load, uri)


@contextmanager
def full_sqlite(folder: Path, _: PostgresServer) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """The write-ahead log reaches the limit first."""
    uri = f"sqlite:///{folder}/agl.db"
    with serving(uri) as (process, url):
        limit_files(process.pid, 2**20)
        yield uri, url, lambda: limit_files(process.pid, resource.RLIM_INFINITY)
    assert maintenance.check(folder / "agl.db") == []


@contextmanager
def full_postgres(_: Path, server: PostgresServer) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """A table reaches the limit; the files of the log have 16 MB each."""
    uri = server.new_database()
    with serving(uri) as (_, url):
        server.limit_files(17 * 2**20)
        yield uri, url, lambda: server.limit_files("unlimited")


def limit_files(pid: int, size: int) -> None:
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.parametrize("full", [full_sqlite, full_postgres])
def test_on_a_full_disk_the_collector_responds_with_retry_later_and_nothing_is_damaged(
    tmp_path: Path, postgres: PostgresServer, full: Callable[..., Any]
) -> None:
    """A limit on file sizes simulates the full disk."""
    with full(tmp_path, postgres) as (uri, url, make_room):
        with Load(url, text=500) as load:
            load.allow(SPANS)
            wait_until(lambda: load.answers[503] >= 5)
            assert len(load.acknowledged) < SPANS
            assert load.acknowledged <= set(found_at(uri))  # Reads still work.
            make_room()
        assert set(load.answers) == {200, 503}
        check(load, uri)


READ_WITHOUT_ROOM = """
import resource, sys
from agl.errors import StoreError
from agl.store import open_store
from tests.store.spans import make_span

resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
store = open_store(sys.argv[1])
print(len(store.query_spans("r1")))
try:
    store.append_spans([make_span(2)])
except StoreError as error:
    print(error)
"""


def test_a_store_on_a_full_disk_can_be_opened_and_read(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/agl.db"
    with closing(open_store(uri)) as store:
        store.append_spans([make_span(1, rollout="r1")])
        reader = [sys.executable, "-c", READ_WITHOUT_ROOM, uri]
        done = subprocess.run(reader, capture_output=True, text=True, timeout=60, check=True)
        found, refusal = done.stdout.splitlines()
        assert found == "1"
        assert "did not keep the change" in refusal and "look at the disk" in refusal
        assert store.append_spans([make_span(2)]) == 1
