"""Emitters: each records one span of no duration below the current span, in the current rollout and role.

Every emitter takes `attributes` (more span attributes) as its last argument and returns the id of its span (16 hex
digits; a later reward may name it as its `target`). None raises into the agent: a value that a span cannot hold is
logged and the emitter returns None. With `AGL_STRICT=1`, for an agent's tests, it raises TelemetryError instead.
Outside of `agl.rollout`, the trace is the rollout.
"""

from agl.emit.annotation import emit_annotation
from agl.emit.exception import emit_exception
from agl.emit.message import emit_message
from agl.emit.object import emit_object
from agl.emit.observation import emit_observation
from agl.emit.operation import operation
from agl.emit.reward import emit_reward

__all__ = [
    "emit_annotation",
    "emit_exception",
    "emit_message",
    "emit_object",
    "emit_observation",
    "emit_reward",
    "operation",
]
