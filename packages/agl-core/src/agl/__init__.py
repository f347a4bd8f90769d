"""Train the agent you already have: record its runs as OpenTelemetry spans with rollouts, roles and rewards."""

from agl.carry import carry
from agl.context import current_role, current_rollout, role, rollout
from agl.emit import (
    emit_annotation,
    emit_exception,
    emit_message,
    emit_object,
    emit_observation,
    emit_reward,
    operation,
)
from agl.propagation import environment, headers, joined
from agl.tracing import flush, init, shutdown

__all__ = [
    "carry",
    "current_role",
    "current_rollout",
    "emit_annotation",
    "emit_exception",
    "emit_message",
    "emit_object",
    "emit_observation",
    "emit_reward",
    "environment",
    "flush",
    "headers",
    "init",
    "joined",
    "operation",
    "role",
    "rollout",
    "shutdown",
]
