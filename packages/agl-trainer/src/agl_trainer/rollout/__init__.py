"""Produces rollouts: runs the agents, has a judge rank their attempts, reads rollouts from the store."""
