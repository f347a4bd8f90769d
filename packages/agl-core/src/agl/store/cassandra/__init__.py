"""The store for a cluster that grows by nodes: one Cassandra keyspace."""
