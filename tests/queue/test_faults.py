"""A writer or Redis killed under load, and a cluster: every acknowledged span is stored exactly once."""

import os
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from agl import otlp
from agl.collector.http import PROTOBUF
from agl.queue import SpanQueue, WriterPool
from tests.load import SPANS, Load, check
from tests.ports import free_port
from tests.queue.collecting import collecting, make_rows, make_spans, numbers_in
from tests.queue.conftest import NewConfig
from tests.queue.redis_server import DURABLE, RedisServer
from tests.waiting import wait_until


def kill_while_it_moves(queue: SpanQueue, pool: WriterPool) -> None:
    """SIGKILL a writer that has taken spans and not finished them."""

    def is_stopped_with_spans() -> bool:
        for pid in pool.pids:
            os.kill(pid, signal.SIGSTOP)
            if taken(queue):
                os.kill(pid, signal.SIGKILL)
                return True
            os.kill(pid, signal.SIGCONT)
        return False

    wait_until(is_stopped_with_spans)


def taken(queue: SpanQueue) -> int:
    """Entries that a writer has taken and not finished."""
    return queue._redis.xpending(queue._stream, "writers")["pending"]


def test_a_writer_killed_twice_under_load_loses_and_duplicates_nothing(
    redis: RedisServer, new_config: NewConfig, tmp_path: Path
) -> None:
    uri = f"sqlite:///{tmp_path}/agl.db"
    with collecting(redis.uri, uri, new_config()) as (queue, pool, server, _):
        with Load(f"{server.otlp_url}/v1/traces") as load:
            for part in (SPANS // 3, SPANS * 2 // 3):
                load.reach(part)
                kill_while_it_moves(queue, pool)
                assert len(load.acknowledged) < SPANS
        wait_until(lambda: queue.length() == 0)
    check(load, uri)


def test_a_redis_killed_twice_under_load_loses_and_duplicates_nothing(new_config: NewConfig, tmp_path: Path) -> None:
    redis, uri = RedisServer(tmp_path / "redis"), f"sqlite:///{tmp_path}/agl.db"
    redis.start()
    try:
        with collecting(redis.uri, uri, new_config()) as (queue, _, server, _):
            with Load(f"{server.otlp_url}/v1/traces") as load:
                for part in (SPANS // 3, SPANS * 2 // 3):
                    load.reach(part)
                    redis.kill()
                    wait_until(lambda: load.refused > 0)
                    assert len(load.acknowledged) < SPANS
                    redis.start()
            wait_until(lambda: queue.length() == 0)
    finally:
        redis.kill()
    assert set(load.answers) == {200, 503}
    check(load, uri)


def test_a_redis_that_stalls_is_answered_before_senders_give_up(new_config: NewConfig, tmp_path: Path) -> None:
    """Exporters wait for 10 s. More requests come than threads take at once. Health takes no longer than usual."""
    redis, uri = RedisServer(tmp_path / "redis"), f"sqlite:///{tmp_path}/agl.db"
    redis.start()
    try:
        with collecting(redis.uri, uri, new_config()) as (_, _, server, _), ThreadPoolExecutor(40) as pool:
            redis.send(signal.SIGSTOP)
            body, headers = otlp.encode(make_spans(1, 1)), {"content-type": PROTOBUF}
            url = f"{server.otlp_url}/v1/traces"
            posts = [pool.submit(httpx.post, url, content=body, headers=headers, timeout=60) for _ in range(40)]
            health = httpx.get(f"{server.base_url}/api/health", timeout=60)
            assert health.json()["span_queue_length"] is None and health.elapsed.total_seconds() < 3
            answers = [post.result() for post in posts]
            assert {answer.status_code for answer in answers} == {503}
            assert max(answer.elapsed.total_seconds() for answer in answers) < 8
            redis.send(signal.SIGCONT)
            wait_until(lambda: httpx.post(url, content=body, headers=headers).status_code == 200)
    finally:
        redis.send(signal.SIGCONT)
        redis.kill()


def test_a_full_queue_is_stored_after_redis_and_all_writers_were_killed(new_config: NewConfig, tmp_path: Path) -> None:
    """Acknowledged spans are on the disk of Redis before a writer reads them."""
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


def test_a_queue_in_a_cluster_survives_the_kill_of_its_node(
    cluster: list[RedisServer], new_config: NewConfig, tmp_path: Path
) -> None:
    uri = "redis://" + ",".join(f"127.0.0.1:{node.port}" for node in cluster)
    store_uri = f"sqlite:///{tmp_path}/agl.db"
    with collecting(uri, store_uri, new_config()) as (queue, _, server, _):
        queue.check_durability()
        with Load(f"{server.otlp_url}/v1/traces") as load:
            load.reach(SPANS // 2)
            holders = [node for node in cluster if node.client().keys("*:spans")]
            assert len(holders) == 1  # All of a queue is on one node.
            holders[0].kill()
            wait_until(lambda: load.refused > 0)
            assert len(load.acknowledged) < SPANS
            holders[0].start()
        wait_until(lambda: queue.length() == 0)
    assert set(load.answers) == {200, 503}
    check(load, store_uri)


def test_any_node_reports_the_whole_cluster(cluster: list[RedisServer], new_config: NewConfig) -> None:
    for node in cluster:
        with closing(SpanQueue(node.uri, new_config())) as queue:
            assert queue.length() == 0
