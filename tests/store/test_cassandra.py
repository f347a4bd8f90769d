"""Cassandra only: nodes that fail and restart, partitions of several buckets, URIs, creating the keyspace."""

import threading
from collections.abc import Iterator
from contextlib import closing
from uuid import uuid4

import pytest
from cassandra.cluster import Session

from agl.errors import InputError, StoreError
from agl.store import AttemptState, Collected, Resource, Rollout, RolloutState, open_store
from agl.store.cassandra import membership
from agl.store.cassandra.address import Address
from agl.store.cassandra.schema import MIGRATIONS
from agl.store.cassandra.span_partition import BucketFill
from agl.store.cassandra.store import CassandraStore
from tests.load import Load, check
from tests.store.cassandra_server import CassandraServer, running_cassandra
from tests.store.serving import serving
from tests.store.spans import TRACE, answered, asked, make_span, numbers
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def cluster() -> Iterator[CassandraServer]:
    with running_cassandra(3) as cluster:
        yield cluster


@pytest.fixture
def uri(cluster: CassandraServer) -> str:
    return cluster.empty_keyspace()


def run(cluster: CassandraServer, uri: str, query: str) -> list[tuple]:
    with cluster.connect() as connection:
        session: Session = connection.connect(Address.of(uri).keyspace)
        return [tuple(row) for row in session.execute(query)]


# --- Nodes -----------------------------------------------------------------------------------------------------------


def test_a_node_killed_under_load_and_restarted_loses_no_acknowledged_span(cluster: CassandraServer, uri: str) -> None:
    open_store(uri).close()
    with serving(uri) as (_, url), Load(url, spans=15_000) as load:
        load.reach(load.spans // 3)
        cluster.kill(cluster.hosts[1])
        load.reach(load.spans // 2)  # Two of three copies are enough.
        assert len(load.acknowledged) < load.spans
        cluster.start(cluster.hosts[1])
        cluster.wait_until_up()
    check(load, uri)


def test_the_queue_works_with_one_node_down_and_fails_with_two_down(
    cluster: CassandraServer, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"r{number}" for number in range(10)]
    with closing(open_store(uri)) as store:
        store.append_spans([make_span(1)])
        store.enqueue_rollouts([Rollout(name, 1, group_id="g") for name in names])
        first = store.lease_rollout("worker")
        cluster.kill(cluster.hosts[0])
        leased = [first, *(store.lease_rollout("worker") for _ in names)]
        assert [pair and pair[0].rollout_id for pair in leased] == [*names, None]
        for name in names:
            assert store.finish_attempt(f"{name}-a1", AttemptState.SUCCEEDED).state is RolloutState.SUCCEEDED
        assert len(store.wait_for_group("g", timeout_s=60)) == 10
        cluster.kill(cluster.hosts[1])
        with monkeypatch.context() as patience:
            patience.setattr("agl.store.cassandra.keyspace._TRY_FOR_S", 1.0)
            with pytest.raises(StoreError, match=r"did not .* the store cassandra://127\.0\.0\.1") as caught:
                store.append_spans([make_span(1), make_span(2)])
        assert not isinstance(caught.value, InputError)
        # What was acknowledged has to come back from the disks alone.
        cluster.kill(cluster.hosts[2])
        for host in cluster.hosts:
            cluster.start(host)
        cluster.wait_until_up()
        store.append_spans([make_span(1), make_span(2)])
        assert numbers(store.query_spans(TRACE)) == [1, 2]
        assert store.count_rollouts()[RolloutState.SUCCEEDED] == 10


# --- Partitions ------------------------------------------------------------------------------------------------------


def small_buckets(store: CassandraStore, max_spans: int) -> None:
    store._fill = BucketFill(max_spans=max_spans)


def test_a_full_bucket_is_followed_by_another_and_each_span_is_stored_once(cluster: CassandraServer, uri: str) -> None:
    with closing(CassandraStore(uri)) as store, closing(CassandraStore(uri)) as other:
        for opened in (store, other):
            small_buckets(opened, 10)
        for first in range(1, 41, 4):
            assert store.append_spans([make_span(n, rollout="r", start_ns=n) for n in range(first, first + 4)]) == 4
        assert other.append_spans([make_span(n, rollout="r") for n in range(1, 43)]) == 2
        found = dict(run(cluster, uri, "SELECT bucket, span FROM spans"))
        assert sorted(found) == [0, 1, 2, 3]
        assert numbers(other.query_spans("r")) == list(range(1, 43))
        assert other.count_spans() == 42
        assert store.gc(max_bytes=0, now_ns=2**62) == Collected(rollouts=1, spans=42)
        assert run(cluster, uri, "SELECT home FROM span_bodies") == []
        assert store.append_spans([make_span(1, rollout="r")]) == 1
        assert numbers(other.query_spans("r")) == [1]


def test_spans_that_arrive_while_their_rollout_is_deleted_stay(
    cluster: CassandraServer, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(CassandraStore(uri)) as store, closing(CassandraStore(uri)) as other:
        store.append_spans([make_span(1, rollout="r")])
        real = membership.find_spans
        late = [make_span(2, rollout="r")]

        def find_and_append(db: object, rollout_id: str) -> object:
            found = real(store._keyspace, rollout_id)
            other.append_spans(late)
            return found

        monkeypatch.setattr("agl.store.cassandra.membership.find_spans", find_and_append)
        assert store.gc(max_bytes=0, now_ns=2**62) == Collected(rollouts=1, spans=1)
        assert numbers(store.query_spans("r")) == [2]


def test_gc_leaves_no_rows_of_a_deleted_rollout_in_any_table(cluster: CassandraServer, uri: str) -> None:
    with closing(open_store(uri)) as store:
        store.enqueue_rollouts([Rollout("r", 1, group_id="g", timeout_s=5)])
        store.lease_rollout("worker")
        store.append_spans([make_span(1, rollout="r"), asked(2, "a", rollout="r"), answered(3, "a"), make_span(4)])
        store.finish_attempt("r-a1", AttemptState.SUCCEEDED)
        assert store.gc(max_bytes=0) == Collected(rollouts=1, spans=4)
        assert store.end_overdue_attempts() == []
        assert store.lease_rollout("worker") is None
        assert store.last_rollout_id() is None
    tables = ("spans", "span_bodies", "responses", "traces", "rollouts", "rollout_groups", "queue", "watched")
    assert {table: run(cluster, uri, f"SELECT * FROM {table}") for table in tables} == {table: [] for table in tables}


def test_values_that_cassandra_cannot_store_raise_input_error_and_affect_no_others(uri: str) -> None:
    with closing(open_store(uri)) as store:
        for name, version in (("w", 2**70), ("n" * 100_000, 1), ("\ud800", 1)):
            with pytest.raises(InputError, match="can never keep this"):
                store.put_resource(Resource(name, version, "u"))
        store.put_resource(Resource("w", 1, "u"))
        assert store.get_resource("w") == Resource("w", 1, "u")
        with pytest.raises(InputError, match="a span of 16000"):
            store.append_spans([make_span(1), make_span(2, text="x" * 16_000_000)])
        assert store.append_spans([make_span(1, rollout="r\0")]) == 1
        assert numbers(store.query_spans("r\0")) == [1]


def test_a_long_body_comes_back_whole(uri: str) -> None:
    span = make_span(1, text="x" * 3_000_000)
    with closing(open_store(uri)) as store:
        store.append_spans([span])
        assert store.query_spans(TRACE) == [span]


def test_the_last_rollout_is_found_after_gc_deleted_the_latest(uri: str) -> None:
    with closing(open_store(uri)) as store:
        store.append_spans([make_span(1, rollout="old")])
        store.enqueue_rollouts([Rollout("old", 1), Rollout("new", 2)])
        store.lease_rollout("worker")
        store.append_spans([make_span(2, rollout="new")])
        store.cancel_rollouts(["new"])
        assert store.gc(max_bytes=0) == Collected(rollouts=1, spans=1)
        assert store.last_rollout_id() == "old"


# --- Transactions ----------------------------------------------------------------------------------------------------


def test_a_repeated_transaction_detects_that_its_first_try_succeeded(uri: str) -> None:
    change = "UPDATE resources SET revision = ? WHERE name = ? IF revision = ?"
    with closing(CassandraStore(uri)) as store:
        store.put_resource(Resource("writer", 0, "adapters/0"))
        db = store._keyspace
        ((before,),) = db.read("SELECT DISTINCT revision FROM resources WHERE name = ?", "writer")
        mine, theirs = uuid4(), uuid4()
        assert db.compare_and_set([(change, (mine, "writer", before))], mine)
        assert db.compare_and_set([(change, (mine, "writer", before))], mine)  # Sent again.
        assert not db.compare_and_set([(change, (theirs, "writer", before))], theirs)


def test_a_version_is_leased_or_collected_but_never_both(uri: str) -> None:
    kept: list[int] = []

    def lease(store: CassandraStore) -> None:
        for version in range(20):
            if store.lease_resource("writer", "engine", 60, version):
                kept.append(version)

    with closing(CassandraStore(uri)) as store, closing(CassandraStore(uri)) as other:
        for version in range(21):
            store.put_resource(Resource("writer", version, f"adapters/{version}"))
        thread = threading.Thread(target=lease, args=(other,))
        thread.start()
        gone: list[int] = []
        wait_until(lambda: bool(kept))
        while thread.is_alive():
            gone += [resource.version for resource in store.collect_resources("writer")]
        thread.join()
        gone += [resource.version for resource in store.collect_resources("writer")]
    assert sorted(kept + gone) == list(range(20))


# --- The keyspace ----------------------------------------------------------------------------------------------------


def test_processes_that_create_the_same_store_at_once_create_one(cluster: CassandraServer) -> None:
    uri, failed = cluster.new_keyspace(), []

    def append(number: int) -> None:
        try:
            with closing(open_store(uri)) as store:
                store.append_spans([make_span(number)])
        except StoreError as error:
            failed.append(error)

    threads = [threading.Thread(target=append, args=(number,)) for number in range(1, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    with closing(open_store(uri)) as store:
        assert numbers(store.query_spans(TRACE)) == [1, 2, 3]
    keyspace = Address.of(uri).keyspace
    found = run(
        cluster, uri, f"SELECT strategy_options FROM system.schema_keyspaces WHERE keyspace_name = '{keyspace}'"
    )
    assert found == [('{"datacenter1":"3"}',)]
    check_refusals(cluster, uri)


def test_a_migration_that_was_not_recorded_is_completed(cluster: CassandraServer, uri: str) -> None:
    open_store(uri).close()
    run(cluster, uri, "INSERT INTO schema_version (place, version) VALUES (0, 1)")
    open_store(uri).close()
    assert run(cluster, uri, "SELECT version FROM schema_version WHERE place = 0") == [(len(MIGRATIONS),)]


def check_refusals(cluster: CassandraServer, uri: str) -> None:
    """A newer schema, and then tables of another program: their keyspaces take long to make."""
    run(cluster, uri, "INSERT INTO schema_version (place, version) VALUES (0, 99)")
    with pytest.raises(StoreError, match="schema version 99"):
        open_store(uri)
    run(cluster, uri, "DROP TABLE schema_version")
    with pytest.raises(StoreError, match="tables of another program"):
        open_store(uri)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("cassandra://me:s3cr3t@127.0.0.1:1/agl", r"cassandra://\*\*\*@127\.0\.0\.1:1/agl"),
        ("cassandra://me:s3cr3t@h1/agl?copies=3", "option 'copies'; known are port, replication_factor"),
        ("cassandra://h1:1,h2:2/agl", "one port for all"),
        ("cassandra://h1,h2/no-keyspace", "keyspace 'no-keyspace'"),
        ("cassandra://h1,h2/agl?replication_factor=x", "replication_factor 'x', expected a number"),
    ],
)
def test_errors_for_an_invalid_address_show_it_without_its_password(uri: str, message: str) -> None:
    with pytest.raises(StoreError, match=message) as caught:
        open_store(uri)
    assert "s3cr3t" not in str(caught.value)


def test_an_address_has_hosts_a_port_and_options() -> None:
    address = Address.of("cassandra://me:a%21b@h1,h2:9043/agl?replication_factor=5&datacenter=east&protocol_version=4")
    assert (address.hosts, address.port, address.keyspace) == (("h1", "h2"), 9043, "agl")
    assert (address.user, address.password) == ("me", "a!b") and "a!b" not in repr(address)
    assert (address.replication_factor, address.datacenter, address.protocol_version) == (5, "east", 4)
    assert Address.of("cassandra://h1/agl").port == 9042
