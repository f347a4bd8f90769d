"""The durable queue between collector and store, in Redis.

connection  a client of a Redis server or a Redis Cluster
durability  checks whether Redis may lose acknowledged spans
queue       the Redis stream: append, take, finish, count
writer      moves spans from the queue into the store
pool        processes that each run a writer, more of them while the queue is long
hook        notifies a URL or runs a command when the queue is long
"""

from agl.queue.pool import WriterPool
from agl.queue.queue import SpanQueue

__all__ = ["SpanQueue", "WriterPool"]
