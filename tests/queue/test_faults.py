"""A writer, and Redis itself, killed under load; and a cluster. Every acknowledged span is found exactly once."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from agl.queue import SpanQueue
from agl.store import Store
from tests.queue.conftest import NewConfig
from tests.queue.load import Load, collecting, make_rows, numbers_in
from tests.queue.redis_server import DURABLE, RedisServer, free_port, wait_until

BATCHES, SIZE = 200, 50
SPANS = BATCHES * SIZE


def check(load: Load, queue: SpanQueue, store: Store) -> None:
    """Once the load is over and the queue is empty: nothing acknowledged is lost, nothing is there twice."""
    load.join(60)
    assert not load.is_alive()
    wait_until(lambda: queue.length() == 0)
    found = numbers_in(store)
    counts = {"sent": load.sent, "acknowledged": len(load.acknowledged), "found": len(found)}
    assert sorted(load.acknowledged) == list(range(1, SPANS + 1)), counts
    assert found == list(range(1, SPANS + 1)), counts
    assert store.count_spans() == SPANS
    assert load.sent >= SPANS


def test_a_writer_killed_under_load_loses_and_doubles_nothing(
    redis: RedisServer, new_config: NewConfig, tmp_path: Path
) -> None:
    with collecting(redis.uri, f"sqlite:///{tmp_path}/agl.db", new_config()) as (queue, pool, server, store):
        load = Load(server.otlp_url, BATCHES, SIZE)
        load.start()
        for acknowledged in (SPANS // 4, SPANS // 2):
            load.wait_for(acknowledged)
            wait_until(lambda: bool(pool.pids))
            os.kill(pool.pids[0], signal.SIGKILL)
        check(load, queue, store)


def test_redis_killed_under_load_loses_and_doubles_nothing(new_config: NewConfig, tmp_path: Path) -> None:
    redis = RedisServer(tmp_path / "redis")
    redis.start()
    try:
        with collecting(redis.uri, f"sqlite:///{tmp_path}/agl.db", new_config()) as (queue, _, server, store):
            load = Load(server.otlp_url, BATCHES, SIZE)
            load.start()
            for acknowledged in (SPANS // 4, SPANS // 2):
                load.wait_for(acknowledged)
                redis.kill()
                redis.start()
            check(load, queue, store)
    finally:
        redis.kill()


def test_everything_killed_with_a_full_queue_the_next_start_stores_it(new_config: NewConfig, tmp_path: Path) -> None:
    """Acknowledged is on the disk of Redis, before any writer has seen it."""
    redis, config = RedisServer(tmp_path / "redis"), new_config()
    redis.start()
    try:
        with closing(SpanQueue(redis.uri, config)) as queue:
            queue.append_rows(make_rows(1, 500))
            assert queue.take("dead")
            redis.kill()
            redis.start()
        with collecting(redis.uri, f"sqlite:///{tmp_path}/agl.db", new_config(claim_after_s=0.2)) as (
            queue,
            _,
            _,
            store,
        ):
            wait_until(lambda: queue.length() == 0)
            assert numbers_in(store) == list(range(1, 501))
    finally:
        redis.kill()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RedisServer]]:
    """Three nodes, no replicas."""
    folder = tmp_path_factory.mktemp("cluster")
    nodes: list[RedisServer] = []
    for number in range(3):
        options = (*DURABLE, "--cluster-enabled", "yes", "--cluster-port", str(free_port()))
        nodes.append(RedisServer(folder / str(number), options))
        nodes[-1].start()
    addresses = [f"127.0.0.1:{node.port}" for node in nodes]
    create = ["redis-cli", "--cluster", "create", *addresses, "--cluster-replicas", "0", "--cluster-yes"]
    subprocess.run(create, check=True, capture_output=True, timeout=60)
    wait_until(lambda: all(node.client().cluster("info")["cluster_state"] == "ok" for node in nodes))
    yield nodes
    for node in nodes:
        node.kill()


def test_a_cluster_keeps_a_queue_too_and_its_node_may_be_killed(
    cluster: list[RedisServer], new_config: NewConfig, tmp_path: Path
) -> None:
    uri = "redis://" + ",".join(f"127.0.0.1:{node.port}" for node in cluster)
    with collecting(uri, f"sqlite:///{tmp_path}/agl.db", new_config()) as (queue, _, server, store):
        queue.check_durability()
        load = Load(server.otlp_url, BATCHES, SIZE)
        load.start()
        load.wait_for(SPANS // 4)
        holders = [node for node in cluster if node.client().keys("*:spans")]
        assert len(holders) == 1  # All of a queue is on one node.
        holders[0].kill()
        holders[0].start()
        check(load, queue, store)


def test_any_node_tells_of_the_cluster(cluster: list[RedisServer], new_config: NewConfig) -> None:
    for node in cluster:
        with closing(SpanQueue(node.uri, new_config())) as queue:
            assert queue.length() == 0
