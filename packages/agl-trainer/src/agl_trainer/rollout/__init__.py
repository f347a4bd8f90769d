"""Produces rollouts: runs the agents, ranks their attempts with a judge, reads rollouts from the store."""
