"""The queue and its writer on a real Redis."""

import logging
import re
import threading
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
import trustme

from agl.config import Config, QueueConfig
from agl.errors import ConfigError, InputError, QueueError, StoreError
from agl.queue import SpanQueue, WriterPool
from agl.queue.writer import Writer
from agl.store import open_store, opened_projects
from agl.store.span_row import SpanRow
from tests.ports import free_port
from tests.queue.collecting import make_rows, numbers_in
from tests.queue.conftest import NewConfig
from tests.queue.redis_server import DURABLE, RedisServer


class RefusingStore:
    """A store in memory whose first write fails."""

    def __init__(self) -> None:
        self.refusals = 1
        self.real = open_store("memory://")

    def append_rows(self, rows: Sequence[SpanRow]) -> int:
        if self.refusals:
            self.refusals -= 1
            raise StoreError("the disk is full")
        return self.real.append_rows(rows)


def test_entries_have_the_bytes_of_the_rows_and_count_until_they_are_finished(queue: SpanQueue) -> None:
    rows = make_rows(1, 3)
    assert queue.append_rows([]) == 0
    assert queue.append_rows(rows) == 3
    (entry,) = queue.take("a")
    assert (entry.spans, entry.otlp) == (3, b"".join(row.otlp for row in rows))
    assert queue.length() == 3  # A taken entry still counts.
    queue.finish([entry])
    queue.finish([entry])  # Twice, as if another writer had moved it too.
    assert queue.length() == 0
    assert queue.take("a") == queue.take_unfinished("a") == []


def test_a_large_request_is_split_into_entries_of_limited_size(queue: SpanQueue) -> None:
    large = [SpanRow(b"t" * 16, bytes([n]) * 8, None, None, 1, None, None, b"x" * 400_000) for n in range(5)]
    queue.append_rows(large)
    assert [entry.spans for entry in queue.take("a")] == [2, 2, 1]
    assert queue.length() == 5


def test_entries_of_a_dead_writer_go_to_its_successor_or_after_a_time_to_others(
    redis: RedisServer, new_config: NewConfig
) -> None:
    config = new_config(claim_after_s=1.0)
    with closing(SpanQueue(redis.uri, config)) as queue:
        queue.append_rows(make_rows(1, 2))
        taken = queue.take("dead")
        assert queue.claim("other") == queue.take("other") == queue.take_unfinished("other") == []
        assert queue.take_unfinished("dead") == taken
        threading.Event().wait(1.0)
        assert queue.claim("other") == taken
        assert queue.take_unfinished("dead") == []


def test_spans_are_written_again_after_a_store_error(queue: SpanQueue, new_config: NewConfig) -> None:
    store = RefusingStore()
    writer = Writer("a", queue, store, new_config())  # pyright: ignore[reportArgumentType] - the verb it uses
    queue.append_rows(make_rows(1, 10))
    stop = threading.Event()
    thread = threading.Thread(target=writer.run, args=(stop,))
    thread.start()
    try:
        for _ in range(100):
            if queue.length() == 0:
                break
            stop.wait(0.05)
    finally:
        stop.set()
        thread.join()
    assert (store.refusals, queue.length()) == (0, 0)
    assert numbers_in(store.real) == list(range(1, 11))
    store.real.close()


def test_spans_that_are_queued_twice_are_stored_once(queue: SpanQueue, new_config: NewConfig) -> None:
    with closing(open_store("memory://")) as store:
        for _ in range(2):
            queue.append_rows(make_rows(1, 10))
        writer = Writer("a", queue, store, new_config())
        assert writer.move() == 20
        assert (numbers_in(store), queue.length()) == (list(range(1, 11)), 0)


def test_an_entry_that_is_not_otlp_is_set_aside_with_the_reason(
    redis: RedisServer, queue: SpanQueue, new_config: NewConfig
) -> None:
    queue.append_rows([SpanRow(b"t" * 16, b"s" * 8, None, None, 1, None, None, b"\xff\xff")])
    queue.append_rows(make_rows(1, 1))
    with closing(open_store("memory://")) as store, redis.client() as client:
        assert Writer("a", queue, store, new_config()).move() == 1
        ((_, fields),) = client.xrange(f"{{{new_config().name}}}:spans:refused")
        assert fields[b"otlp"] == b"\xff\xff" and b"protobuf" in fields[b"reason"]
        assert (numbers_in(store), queue.length()) == ([1], 0)


def test_spans_of_each_project_go_to_its_store(queue: SpanQueue, new_config: NewConfig, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/agl.db"
    queue.append_rows(make_rows(1, 1))
    for number, project in ((2, "blue"), (3, "red"), (4, "blue")):
        queue.of_project(project).append_rows(make_rows(number, 1))
    with closing(open_store(uri)) as store, closing(Writer("a", queue, store, new_config())) as writer:
        assert (writer.move(), queue.length()) == (4, 0)
        with opened_projects(store, ["blue", "red"]) as stores:
            found = {project: numbers_in(each) for project, each in stores.items()}
    assert found == {"default": [1], "blue": [2, 4], "red": [3]}


class PickyStore:
    """A store in memory that can never store span number 2."""

    def __init__(self) -> None:
        self.real = open_store("memory://")

    def append_rows(self, rows: Sequence[SpanRow]) -> int:
        if any(int.from_bytes(row.span_id, "big") == 2 for row in rows):
            raise InputError("nobody can keep a two")
        return self.real.append_rows(rows)


def test_only_the_entry_that_the_store_can_never_store_is_set_aside(
    redis: RedisServer, queue: SpanQueue, new_config: NewConfig
) -> None:
    store = PickyStore()
    for number in (1, 2, 3):
        queue.append_rows(make_rows(number, 1))
    writer = Writer("a", queue, store, new_config())  # pyright: ignore[reportArgumentType] - the verb it uses
    assert writer.move() == 2
    assert (numbers_in(store.real), queue.length()) == ([1, 3], 0)
    with redis.client() as client:
        ((_, fields),) = client.xrange(f"{{{new_config().name}}}:spans:refused")
    assert fields[b"reason"] == b"nobody can keep a two"
    store.real.close()


def test_it_works_over_tls_and_errors_do_not_show_the_password(tmp_path: Path, new_config: NewConfig) -> None:
    authority, tls_port = trustme.CA(), free_port()
    issued = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    issued.private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    files = ("--tls-cert-file", f"{tmp_path}/server.pem", "--tls-key-file", f"{tmp_path}/server.pem")
    options = ("--tls-port", str(tls_port), *files, "--tls-ca-cert-file", f"{tmp_path}/ca.pem")
    server = RedisServer(tmp_path / "redis", (*DURABLE, *options, "--tls-auth-clients", "no"))
    server.start()
    try:
        with server.client() as client:
            client.config_set("requirepass", "s3cret")
        address, trusting = f"127.0.0.1:{tls_port}", f"?ssl_ca_certs={tmp_path}/ca.pem"
        with closing(SpanQueue(f"rediss://:s3cret@{address}{trusting}", new_config())) as queue:
            queue.check_durability()
            assert queue.append_rows(make_rows(1, 3)) == 3
            assert [entry.spans for entry in queue.take("a")] == [3]
            assert queue.uri == f"rediss://***@{address}?***"
        for uri in (f"rediss://:wr0ng@{address}{trusting}", f"rediss://:s3cret@{address}"):
            with pytest.raises(QueueError, match=address) as caught:
                SpanQueue(uri, new_config())
            assert "wr0ng" not in str(caught.value) and "s3cret" not in str(caught.value)
    finally:
        server.kill()


def test_at_the_hard_limit_it_rejects_spans_until_entries_are_finished(
    redis: RedisServer, new_config: NewConfig
) -> None:
    with closing(SpanQueue(redis.uri, new_config(high=5, hard_limit=10))) as queue:
        queue.append_rows(make_rows(1, 10))
        with pytest.raises(QueueError, match="10 spans wait for the store"):
            queue.append_rows(make_rows(11, 1))
        queue.finish(queue.take("a"))
        assert queue.append_rows(make_rows(11, 1)) == 1


def test_a_queue_whose_keys_were_deleted_goes_on(redis: RedisServer, queue: SpanQueue, new_config: NewConfig) -> None:
    with redis.client() as client:
        client.delete(f"{{{new_config().name}}}:spans", f"{{{new_config().name}}}:spans:length")
    assert queue.take("a") == []
    queue.append_rows(make_rows(1, 1))
    assert [entry.spans for entry in queue.take("a")] == [1]


def test_redis_out_of_memory_rejects_spans_and_lets_writers_finish(tmp_path: Path, new_config: NewConfig) -> None:
    server = RedisServer(tmp_path)
    server.start()
    try:
        with closing(SpanQueue(server.uri, new_config())) as queue, server.client() as client:
            queue.append_rows(make_rows(1, 5))
            client.config_set("maxmemory", "1mb")
            with pytest.raises(QueueError, match="maxmemory"):
                queue.append_rows(make_rows(6, 5))
            queue.finish(queue.take("a"))
            assert queue.length() == 0
            client.config_set("maxmemory-policy", "allkeys-lru")
            with pytest.raises(QueueError, match="evicts keys"):
                queue.check_durability()
    finally:
        server.kill()


@pytest.mark.parametrize(
    ("options", "weakest", "refusal"),
    [
        (("--appendonly", "no"), "everysec", "keeps no append-only file"),
        (("--appendonly", "yes", "--appendfsync", "no"), "everysec", "appendfsync is no"),
        (("--appendonly", "yes", "--appendfsync", "everysec"), "always", "appendfsync is everysec"),
        (("--appendonly", "yes", "--appendfsync", "everysec"), "everysec", None),
        (("--appendonly", "yes", "--appendfsync", "always"), "always", None),
    ],
)
def test_a_redis_that_may_lose_acknowledged_spans_is_rejected_or_logged(
    redis: RedisServer,
    new_config: NewConfig,
    caplog: pytest.LogCaptureFixture,
    options: tuple[str, ...],
    weakest: str,
    refusal: str | None,
) -> None:
    given = dict(zip(options[::2], options[1::2], strict=True))
    with redis.client() as client, closing(SpanQueue(redis.uri, new_config(appendfsync=weakest))) as queue:
        for name, value in given.items():
            client.config_set(name.removeprefix("--"), value)
        try:
            if refusal:
                with pytest.raises(QueueError, match=re.escape(refusal)):
                    queue.check_durability()
            else:
                queue.check_durability()
        finally:
            client.config_set("appendonly", "yes")
            client.config_set("appendfsync", "always")
    warned = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert bool(warned) == (refusal is None and "everysec" in options)


def test_errors_show_the_address_and_never_the_password() -> None:
    with pytest.raises(QueueError, match=r"redis://\*\*\*@127\.0\.0\.1:9: ") as caught:
        SpanQueue("redis://user:secret@127.0.0.1:9")
    assert "secret" not in str(caught.value)
    with pytest.raises(QueueError, match="known are redis and rediss"):
        SpanQueue("amqp://127.0.0.1")


def test_invalid_settings_are_rejected(queue: SpanQueue) -> None:
    with pytest.raises(ConfigError, match="max_writers must not be below min_writers"):
        Config.parse({"queue": {"min_writers": 3, "max_writers": 2}})
    with pytest.raises(ConfigError, match="hard_limit must be above high"):
        Config.parse({"queue": {"high": 10, "hard_limit": 10}})
    with pytest.raises(ConfigError, match="memory://"):
        WriterPool(queue, "memory://", QueueConfig())
