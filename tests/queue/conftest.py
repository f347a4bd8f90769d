"""One Redis server for all tests of the queue. Each test has its own queue on it."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from agl.config import QueueConfig
from agl.queue import SpanQueue
from tests.queue.redis_server import RedisServer

NewConfig = Callable[..., QueueConfig]

_numbers = itertools.count()


@pytest.fixture(scope="session")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def new_config() -> NewConfig:
    """Makes settings of the test's own queue, with short times unless stated otherwise."""
    name = f"test-{next(_numbers)}"

    def new_config(**settings: Any) -> QueueConfig:
        return QueueConfig(**{"name": name, "check_s": 0.1, "appendfsync": "always"} | settings)

    return new_config


@pytest.fixture
def queue(redis: RedisServer, new_config: NewConfig) -> Iterator[SpanQueue]:
    with closing(SpanQueue(redis.uri, new_config())) as queue:
        yield queue
