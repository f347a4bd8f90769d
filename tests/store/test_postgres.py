"""PostgreSQL only: partitions, a server that is killed, passwords, and other programs in the database."""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import psycopg
import pytest

from agl.errors import InputError, StoreError
from agl.store import AttemptState, Collected, Resource, Rollout, RolloutState, open_store
from agl.store.membership import trace_id_of
from agl.store.postgres.spans import DAY_NS, QUERY
from agl.store.postgres.store import PostgresStore
from tests.store.postgres_server import PostgresServer, running_postgres
from tests.store.spans import TRACE, asked, make_span, numbers


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with running_postgres() as server:
        yield server


@pytest.fixture(scope="module")
def durable_server() -> Iterator[PostgresServer]:
    with running_postgres(durable=True) as server:
        yield server


@pytest.fixture
def uri(server: PostgresServer) -> str:
    return server.new_database()


def one(uri: str, query: str) -> tuple:
    with psycopg.connect(uri, autocommit=True) as connection:
        found = connection.execute(query.encode()).fetchone()
    assert found is not None
    return found


def partitions(uri: str) -> list[str]:
    with psycopg.connect(uri) as connection:
        rows = connection.execute("SELECT relid::text FROM pg_partition_tree('agl.span_bodies') WHERE isleaf")
        return sorted(name for (name,) in rows)


# --- Faults ----------------------------------------------------------------------------------------------------------


def test_waiting_for_a_rollout_survives_a_restart_of_the_server(
    durable_server: PostgresServer,
) -> None:
    found: list[Rollout] = []
    with closing(PostgresStore(durable_server.new_database())) as store:
        store.enqueue_rollouts([Rollout("r", 1)])
        store.lease_rollout("worker")
        waiter = threading.Thread(target=lambda: found.extend(wait(store)))
        waiter.start()
        time.sleep(0.3)
        durable_server.kill()
        durable_server.start()
        store.finish_attempt("r-a1", AttemptState.SUCCEEDED)
        waiter.join(30)
    assert [rollout.state for rollout in found] == [RolloutState.SUCCEEDED]


def wait(store: PostgresStore) -> list[Rollout]:
    while True:
        try:
            return store.wait_for_rollouts(["r"], timeout_s=30)
        except StoreError:
            time.sleep(0.05)


def test_commits_are_synchronous_even_if_the_database_default_is_not(uri: str) -> None:
    database = uri.rpartition("/")[2]
    with psycopg.connect(uri, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {database} SET synchronous_commit TO off".encode())
    with closing(PostgresStore(uri)) as store:
        found = store._database.read(lambda db: db.execute("SHOW synchronous_commit").fetchone())
    assert found == ("on",)


def test_the_end_of_a_rollout_is_notified_without_polling(uri: str) -> None:
    with closing(PostgresStore(uri)) as here, closing(PostgresStore(uri)) as there:
        here._ends._poll_s = 60
        here.enqueue_rollouts([Rollout("r", 1)])
        there.lease_rollout("worker")
        timer = threading.Timer(0.3, there.finish_attempt, ("r-a1", AttemptState.SUCCEEDED))
        timer.start()
        (rollout,) = here.wait_for_rollouts(["r"], timeout_s=20)
        timer.join()
    assert rollout.state is RolloutState.SUCCEEDED


def test_a_lease_skips_rollouts_that_another_transaction_has_locked(uri: str) -> None:
    with closing(PostgresStore(uri)) as store, psycopg.connect(uri) as other:
        store.enqueue_rollouts([Rollout("first", 1), Rollout("second", 2)])
        other.execute("SELECT FROM agl.rollouts WHERE rollout_id = 'first' FOR UPDATE")
        leased = store.lease_rollout("worker")
        other.rollback()
        assert leased is not None and leased[0].rollout_id == "second"


# --- Days ------------------------------------------------------------------------------------------------------------


def on_day(store: PostgresStore, monkeypatch: pytest.MonkeyPatch, days: int) -> None:
    """Move the clock of the store by `days` days."""
    now_ns = time.time_ns() + days * DAY_NS
    monkeypatch.setattr(store._database, "now_ns", lambda: now_ns)


def test_a_span_sent_again_on_another_day_is_stored_once(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(PostgresStore(uri)) as store:
        assert store.append_spans([make_span(1, rollout="r"), make_span(2, rollout="r")]) == 2
        on_day(store, monkeypatch, 1)
        assert store.append_spans([make_span(1, rollout="r"), make_span(3, rollout="r")]) == 1
        assert len(partitions(uri)) == 2
        assert one(uri, "SELECT count(*) FROM agl.span_bodies") == (3,)
        assert numbers(store.query_spans("r")) == [1, 2, 3]
        assert store.last_rollout_id() == "r"


def test_partitions_of_days_without_spans_are_dropped(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(PostgresStore(uri)) as store:
        store.enqueue_rollouts([Rollout("running", 1)])
        store.lease_rollout("worker")
        for day in range(4):
            on_day(store, monkeypatch, day)
            spans = [make_span(day * 10 + 1, trace=f"{day + 1:032x}", rollout=f"r{day}")]
            kept = [make_span(5, trace="f" * 32, rollout="running")] if day == 1 else []
            store.append_spans(spans + kept)
        before = partitions(uri)
        assert store.gc(older_than_s=1.5 * 86_400) == Collected(rollouts=2, spans=2)
        assert partitions(uri) == before[1:]  # The second day has a span of what still runs, and that alone.
        assert one(uri, "SELECT count(*) FROM agl.span_bodies") == (3,)
        assert numbers(store.query_spans("running")) == [5]
        store.finish_attempt("running-a1", AttemptState.SUCCEEDED)
        on_day(store, monkeypatch, 9)
        assert store.gc(older_than_s=86_400) == Collected(rollouts=3, spans=3)
        assert partitions(uri) == []
        assert store.append_spans([make_span(1, rollout="late")]) == 1


def test_reading_a_rollout_looks_up_its_own_spans_only(uri: str) -> None:
    """The planner overestimates the size of a rollout: with a join it would read the bodies of all rollouts."""
    with closing(PostgresStore(uri)) as store:
        for rollout in range(20):
            trace, name = f"{rollout + 1:032x}", f"r{rollout}"
            store.append_spans([make_span(n, trace=trace, rollout=name, text="x" * 500) for n in range(1, 101)])
        store._database.write(lambda db: db.execute("ANALYZE"))
        query, parameters = f"EXPLAIN {QUERY}", {"rollouts": ["r7"], "traces": [trace_id_of("r7")]}
        plan = store._database.read(lambda db: db.execute(query, parameters).fetchall())
    text = "\n".join(line for (line,) in plan)
    assert "Index Scan" in text
    assert not any(step in text for step in ("Seq Scan", "Merge Join", "Hash Join")), text


# --- The database ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", ["postgresql://me:s3cr3t%21@127.0.0.1:1/db", "postgresql://127.0.0.1:1/db?password=s3cr3t%21"]
)
def test_errors_name_the_server_but_never_the_password(form: str) -> None:
    with pytest.raises(StoreError, match=r"127\.0\.0\.1:1/db") as caught:
        open_store(form)
    assert "s3cr3t" not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_the_error_for_an_invalid_uri_does_not_show_its_password() -> None:
    with pytest.raises(StoreError) as caught:
        open_store("postgresql://me:s3cr3t%zz@127.0.0.1:1/db")
    assert "s3cr3t" not in str(caught.value)


def test_a_newer_schema_is_rejected(uri: str) -> None:
    open_store(uri).close()
    with psycopg.connect(uri, autocommit=True) as connection:
        connection.execute("UPDATE agl.version SET version = 99")
    with pytest.raises(StoreError, match="schema version 99"):
        open_store(uri)


def test_a_schema_of_another_program_is_rejected_and_not_changed(uri: str) -> None:
    with psycopg.connect(uri, autocommit=True) as connection:
        connection.execute("CREATE TABLE spans (id integer)")
    open_store(uri).close()  # In another schema: not in our way.
    with psycopg.connect(uri, autocommit=True) as connection:
        connection.execute("DROP SCHEMA agl CASCADE")
        connection.execute("CREATE SCHEMA agl CREATE TABLE spans (id integer)")
    with pytest.raises(StoreError, match="another program"):
        open_store(uri)
    assert one(uri, "SELECT count(*) FROM information_schema.columns WHERE table_name = 'spans'") == (2,)


def test_ids_that_postgresql_cannot_store_do_not_block_other_spans_of_the_batch(uri: str) -> None:
    with closing(PostgresStore(uri)) as store:
        assert store.append_spans([asked(1, "a\0b"), make_span(2, rollout="r\0", attempt="\0-a1")]) == 2
        assert [span.attributes.get("gen_ai.response.id") for span in store.query_spans(TRACE)] == ["a\0b"]
        assert numbers(store.query_spans("r\0")) == [1, 2]


def test_values_that_postgresql_cannot_store_raise_input_error(uri: str) -> None:
    with closing(PostgresStore(uri)) as store:
        for name, version in (("w", 2**70), (random.Random(0).randbytes(5_000).hex(), 1)):
            with pytest.raises(InputError, match="can never keep this"):
                store.put_resource(Resource(name, version, "u"))
        store.put_resource(Resource("w", 1, "u"))
        assert store.get_resource("w") == Resource("w", 1, "u")


def test_a_long_body_comes_back_whole(uri: str) -> None:
    span = make_span(1, text="x" * 3_000_000)
    with closing(PostgresStore(uri)) as store:
        store.append_spans([span])
        assert store.query_spans(TRACE) == [span]


def test_stores_that_append_the_same_spans_in_any_order_do_not_block_each_other(uri: str) -> None:
    spans = [make_span(number, rollout="r") for number in range(1, 201)]
    failed: list[StoreError] = []

    def append(store: PostgresStore, turn: int) -> None:
        try:
            for first in range(0, 200, 40):
                some = spans[first : first + 80]
                store.append_spans(some if turn % 2 else some[::-1])
        except StoreError as error:
            failed.append(error)

    with closing(PostgresStore(uri)) as first, closing(PostgresStore(uri)) as second:
        threads = [threading.Thread(target=append, args=((first, second)[turn % 2], turn)) for turn in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failed == []
        assert numbers(first.query_spans("r")) == list(range(1, 201))
