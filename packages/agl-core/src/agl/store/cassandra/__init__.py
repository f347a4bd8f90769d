"""The store for a cluster that grows by nodes: one Cassandra keyspace."""

from agl.store.cassandra.store import CassandraStore

__all__ = ["CassandraStore"]
