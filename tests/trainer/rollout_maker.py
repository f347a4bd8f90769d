"""Trajectories of rollouts, from spans as short as a test needs them."""

from collections.abc import Sequence
from typing import Any

from agl import semconv
from agl.config import LossConfig
from agl.span import Span
from agl.trajectory import Trajectory, build_trajectory
from agl_trainer.algo.options import BatchOptions
from tests.core.span_maker import gateway_call, reward, span


def call(role: str, response: Sequence[int] = (3, 4), prompt: Sequence[int] = (1, 2), **attributes: Any) -> Span:
    """The gateway's span of a call of `role`. Calls come in the order in which they are made."""
    return gateway_call(prompt, response, role=role, version=f"{role}@0", attributes=attributes)


def reward_on(target: Span | None, value: float, role: str | None = None) -> Span:
    """A reward on one call, on a role, or, with neither, on the rollout."""
    named = {semconv.REWARD_TARGET: target.span_id} if target else {}
    return reward(value, named | ({semconv.ROLE: role} if role else {}))


def trajectory(rollout_id: str, *spans: Span, group_id: str = "g", failed: bool = False) -> Trajectory:
    """The rollout of `spans`, all of its group and its first attempt."""
    ids = {
        semconv.ROLLOUT_ID: rollout_id,
        semconv.GROUP_ID: group_id,
        semconv.ATTEMPT_ID: f"{rollout_id}-a1",
        semconv.MODE: "train",
    }
    whole = span(semconv.SPAN_ROLLOUT, status="error" if failed else "unset", message="boom" if failed else "")
    for part in (whole, *spans):
        part.attributes.update({name: value for name, value in ids.items() if name != semconv.ATTEMPT_ID})
        part.attributes.setdefault(semconv.ATTEMPT_ID, ids[semconv.ATTEMPT_ID])
    return build_trajectory([whole, *spans])


def batch_options(**options: Any) -> BatchOptions:
    """Options of the batch, and of the loss, by their names."""
    loss = {name: options.pop(name) for name in list(options) if name in LossConfig.model_fields}
    return BatchOptions(loss=LossConfig(**loss), **options)
