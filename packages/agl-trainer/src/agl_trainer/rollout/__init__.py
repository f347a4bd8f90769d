"""Rollouts: agents that run, judges that rank, and rollouts that the store holds."""
