"""`agl serve --queue`, the process."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx

from agl import otlp
from agl.collector.http import PROTOBUF
from agl.queue import SpanQueue
from agl.store import open_store
from tests.queue.collecting import make_spans, numbers_in
from tests.queue.conftest import NewConfig
from tests.queue.redis_server import RedisServer
from tests.waiting import is_alive, wait_until

AGL = Path(sys.executable).with_name("agl")
SERVE = [str(AGL), "serve", "--port", "0", "--otlp-http-port", "0", "--otlp-grpc-port", "0"]


@contextmanager
def serving(folder: Path, redis: RedisServer, name: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, and the URL of its collector."""
    (folder / "config.yaml").write_text(f"queue_uri: {redis.uri}\nqueue: {{name: {name}}}\n")
    command = [*SERVE, "--config", "config.yaml", "--upstream", "http://127.0.0.1:9/v1"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert f"-> {redis.uri} -> sqlite:///agl.db" in line
            yield process, line.split()[1].rstrip(",")
        finally:
            process.kill()


def post(url: str, first: int) -> None:
    body = otlp.encode(make_spans(first, 10))
    assert httpx.post(url, content=body, headers={"content-type": PROTOBUF}).status_code == 200


def writers_of(process: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def test_it_moves_spans_through_the_queue_and_a_kill_leaves_no_writer_behind(
    redis: RedisServer, queue: SpanQueue, new_config: NewConfig, tmp_path: Path
) -> None:
    with serving(tmp_path, redis, new_config().name) as (process, url):
        post(url, 1)
        wait_until(lambda: queue.length() == 0)
        with closing(open_store(f"sqlite:///{tmp_path}/agl.db")) as store:
            assert numbers_in(store) == list(range(1, 11))
        writers = writers_of(process)
        assert writers
        post(url, 11)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        wait_until(lambda: not any(is_alive(pid) for pid in writers))
    with serving(tmp_path, redis, new_config().name), closing(open_store(f"sqlite:///{tmp_path}/agl.db")) as store:
        wait_until(lambda: queue.length() == 0)
        assert numbers_in(store) == list(range(1, 21))


def test_a_redis_without_persistence_is_rejected_before_the_server_listens(tmp_path: Path) -> None:
    redis = RedisServer(tmp_path / "redis", ("--appendonly", "no"))
    redis.start()
    try:
        command = [*SERVE, "--queue", redis.uri]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    finally:
        redis.kill()
    assert (done.returncode, done.stdout) == (2, "")
    assert re.search("keeps no append-only file; start it with `--appendonly yes`", done.stderr)
    assert "Traceback" not in done.stderr
