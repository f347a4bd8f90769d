"""The writer pool: it grows and shrinks, replaces dead writers, calls its hook, and exports the queue length."""

import json
import os
import signal
import sqlite3
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest

from agl import otlp
from agl.collector.http import PROTOBUF
from agl.config import QueueConfig
from agl.queue import SpanQueue, WriterPool
from agl.queue.pool import next_size
from agl.server_thread import ServerThread
from agl.store import open_store
from tests.queue.collecting import collecting, make_rows, make_spans, numbers_in
from tests.queue.conftest import NewConfig
from tests.queue.redis_server import RedisServer
from tests.store.postgres_server import running_postgres
from tests.waiting import wait_until


@pytest.mark.parametrize(
    ("size", "length", "calm_s", "wanted"),
    [
        (1, 5000, 0.0, 1),
        (1, 5001, 0.0, 2),
        (3, 5001, 99.0, 3),
        (3, 3000, 29.0, 3),
        (3, 0, 30.0, 2),
        (1, 0, 99.0, 1),
    ],
)
def test_it_grows_by_one_above_high_and_shrinks_by_one_after_calm(
    size: int, length: int, calm_s: float, wanted: int
) -> None:
    assert next_size(size, length, calm_s, QueueConfig(max_writers=3)) == wanted


def test_the_pool_grows_while_the_queue_is_high_and_shrinks_again(
    redis: RedisServer, new_config: NewConfig, tmp_path: Path
) -> None:
    """The test locks the store, so that the queue stays long for as long as the test needs."""
    uri = f"sqlite:///{tmp_path}/agl.db"
    config = new_config(high=20, max_writers=3, shrink_after_s=0.3)
    with closing(open_store(uri)) as store, closing(SpanQueue(redis.uri, config)) as queue:
        with WriterPool(queue, uri, config) as pool, locked(tmp_path / "agl.db"):
            assert len(pool.pids) == 1
            queue.append_rows(make_rows(1, 100))
            wait_until(lambda: len(pool.pids) == 3)
            threading.Event().wait(0.5)
            assert len(pool.pids) == 3
            assert queue.length() == 100
        with WriterPool(queue, uri, config) as pool:
            wait_until(lambda: queue.length() == 0)
            wait_until(lambda: len(pool.pids) == 1)
            pids = pool.pids
        assert numbers_in(store) == list(range(1, 101))
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_a_queue_in_front_of_postgresql(redis: RedisServer, new_config: NewConfig) -> None:
    with running_postgres() as server:
        uri = server.new_database()
        with collecting(redis.uri, uri, new_config()) as (queue, _, receiver, store):
            body, headers = otlp.encode(make_spans(1, 100)), {"content-type": PROTOBUF}
            for _ in range(2):
                answer = httpx.post(f"{receiver.otlp_url}/v1/traces", content=body, headers=headers)
                assert answer.status_code == 200
            wait_until(lambda: queue.length() == 0)
            assert numbers_in(store) == list(range(1, 101))


@contextmanager
def stuck(queue: SpanQueue, path: Path, config: QueueConfig) -> Iterator[None]:
    """A pool with six spans in its queue, and a store that is locked."""
    uri = f"sqlite:///{path}"
    with closing(open_store(uri)), WriterPool(queue, uri, config), locked(path):
        queue.append_rows(make_rows(1, 6))
        yield


@contextmanager
def locked(path: Path) -> Iterator[None]:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


def test_a_killed_writer_is_replaced_and_the_writers_end_with_the_pool(
    queue: SpanQueue, new_config: NewConfig, tmp_path: Path
) -> None:
    with WriterPool(queue, f"sqlite:///{tmp_path}/agl.db", new_config()) as pool:
        (pid,) = pool.pids
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: bool(pool.pids) and pool.pids != [pid])
    assert pool.pids == []


def test_the_hook_runs_a_command_with_the_numbers_once_while_the_queue_stays_high(
    queue: SpanQueue, new_config: NewConfig, tmp_path: Path
) -> None:
    lengths = tmp_path / "told"
    code = f"import os; open({str(lengths)!r}, 'a').write(os.environ['SPAN_QUEUE_LENGTH'] + ' ')"
    config = new_config(high=5, max_writers=1, on_queue_high=f'{sys.executable} -c "{code}"')
    with stuck(queue, tmp_path / "agl.db", config):
        wait_until(lengths.exists)
        threading.Event().wait(0.5)
    assert lengths.read_text().split() == ["6"]


def test_the_hook_posts_the_numbers_to_a_url_and_its_failure_is_only_logged(
    queue: SpanQueue, new_config: NewConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bodies: list[dict[str, int]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_error(500)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    serving.start()
    config = new_config(high=5, max_writers=1, on_queue_high=f"http://127.0.0.1:{server.server_port}/high")
    with stuck(queue, tmp_path / "agl.db", config):
        wait_until(lambda: "on_queue_high failed" in caplog.text)
    server.shutdown()
    serving.join()
    server.server_close()
    assert bodies == [{"span_queue_length": 6, "span_queue_writers": 1}]


def test_the_length_is_exported_and_at_the_hard_limit_senders_are_asked_to_send_again(
    redis: RedisServer, new_config: NewConfig
) -> None:
    config = new_config(high=5, hard_limit=10)
    with (
        closing(open_store("memory://")) as store,
        closing(SpanQueue(redis.uri, config)) as queue,
        ServerThread(store, port=0, otlp_http_port=0, queue=queue) as server,
    ):

        def post(first: int) -> httpx.Response:
            body = otlp.encode(make_spans(first, 10))
            return httpx.post(f"{server.otlp_url}/v1/traces", content=body, headers={"content-type": PROTOBUF})

        assert post(1).status_code == 200
        assert httpx.get(f"{server.base_url}/api/health").json()["span_queue_length"] == 10
        metrics = httpx.get(f"{server.base_url}/metrics")
        assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert "# TYPE span_queue_length gauge\nspan_queue_length 10.0\n" in metrics.text
        refused = post(11)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        queue.finish(queue.take("a"))
        assert post(11).status_code == 200


def test_without_redis_the_length_is_nan_and_spans_are_rejected(tmp_path: Path, new_config: NewConfig) -> None:
    redis = RedisServer(tmp_path / "redis")
    redis.start()
    try:
        with collecting(redis.uri, f"sqlite:///{tmp_path}/agl.db", new_config()) as (_, _, server, _):
            redis.kill()
            assert httpx.get(f"{server.base_url}/api/health").json()["span_queue_length"] is None
            assert "\nspan_queue_length NaN\n" in httpx.get(f"{server.base_url}/metrics").text
            body, headers = otlp.encode(make_spans(1, 1)), {"content-type": PROTOBUF}
            assert httpx.post(f"{server.otlp_url}/v1/traces", content=body, headers=headers).status_code == 503
    finally:
        redis.kill()
