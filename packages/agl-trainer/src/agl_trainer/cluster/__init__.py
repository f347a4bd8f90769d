"""A training on the machines of a Ray cluster. Ray places and restarts processes; it carries no rollout data."""
