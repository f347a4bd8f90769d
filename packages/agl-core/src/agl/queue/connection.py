"""Clients of Redis."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final
from urllib.parse import urlsplit

from redis import Redis
from redis.backoff import NoBackoff
from redis.cluster import RedisCluster
from redis.exceptions import ConnectionError, RedisClusterException, RedisError
from redis.retry import Retry

from agl.errors import QueueError
from agl.secret_url import SecretUrl

Client = Redis | RedisCluster

BLOCK_MS: Final = 500
"""Limit for the time that a command may wait inside Redis."""
_TIMEOUT_S: Final = 3.0
"""Exporters wait for 10 s: later they would not receive the request to retry."""
_SCHEMES: Final = ("redis", "rediss")


def connect(uri: SecretUrl) -> Client:
    """A client of the Redis server or Redis Cluster at `redis[s]://[user:password@]host[:port][,host...][/db]`.

    Several hosts are nodes of one cluster: the first that can be reached reports the others. Raises QueueError.
    """
    reasons: list[str] = []
    nodes = _node_uris(uri)
    for node in nodes:
        try:
            return _connect_node(node, needs_cluster=len(nodes) > 1)
        except (RedisError, RedisClusterException, ValueError) as error:
            reasons.append(f"{node}: {node.hide(str(error))}")
    raise QueueError(f"cannot reach the queue; {'; '.join(reasons)}")


def node_of(client: Client, key: str) -> Redis:
    """A client of the server that stores `key`."""
    if isinstance(client, Redis):
        return client
    node = client.get_node_from_key(key)
    if node is None:
        raise QueueError(f"no node of the Redis Cluster serves the slot of {key}; look at `redis-cli --cluster check`")
    return client.get_redis_connection(node)


@contextmanager
def redis_errors() -> Iterator[None]:
    """Raises errors of Redis and of the connection to it as QueueError."""
    try:
        yield
    except (RedisError, RedisClusterException) as error:
        raise QueueError(f"Redis failed or rejected a command of the queue: {error}") from error


def _node_uris(uri: SecretUrl) -> list[SecretUrl]:
    parts = urlsplit(uri.secret)
    if parts.scheme not in _SCHEMES:
        raise QueueError(f"queue URI {uri} has the scheme {parts.scheme!r}; known are redis and rediss")
    user, at, hosts = parts.netloc.rpartition("@")
    return [SecretUrl(parts._replace(netloc=user + at + host).geturl()) for host in hosts.split(",")]


def _connect_node(uri: SecretUrl, *, needs_cluster: bool) -> Client:
    # One retry on a new connection, for a restart of Redis; none if Redis stalls: the sender of the spans retries.
    retry = Retry(NoBackoff(), 1, supported_errors=(ConnectionError,))
    options: dict[str, Any] = {"protocol": 2, "socket_timeout": _TIMEOUT_S, "retry": retry}
    client = Redis.from_url(uri.secret, **options)
    if client.info("cluster")["cluster_enabled"]:
        client.close()
        return RedisCluster.from_url(uri.secret, **options)
    if needs_cluster:
        client.close()
        raise QueueError(f"{uri} is not a node of a Redis Cluster; name one host only")
    return client
