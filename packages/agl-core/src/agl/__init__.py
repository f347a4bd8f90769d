"""Train the agent you already have: its runs as OpenTelemetry spans with rollouts, roles and rewards."""

from agl.context import current_role, current_rollout, headers, role, rollout

__all__ = ["current_role", "current_rollout", "headers", "role", "rollout"]
