"""The durable queue between receivers and writers, in Redis.

connection  a client of a Redis, or of a Redis Cluster
durability  whether that Redis keeps what it acknowledges
queue       the stream: put, take, finish, count
writer      moves spans from the queue into the store
pool        processes that each run a writer, more while the queue is long
hook        tells others that the queue is long
"""

from agl.queue.pool import WriterPool
from agl.queue.queue import SpanQueue

__all__ = ["SpanQueue", "WriterPool"]
