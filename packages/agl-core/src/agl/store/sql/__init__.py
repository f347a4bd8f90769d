"""The verbs that SQLite and PostgreSQL share, over the small protocol of `database`.

database   what a backend provides: connections, transactions, placeholders, locks
rollouts   the queue of rollouts and their attempts
resources  versioned resources, their leases, and metrics
traffic    pending spans and decisions
retention  which rollouts `gc` deletes
store      the store class, from which both backends inherit
"""
