"""Spans of a rollout, as short as a test needs them."""

import itertools
from collections.abc import Sequence
from typing import Any

from agl import semconv
from agl.span import AttributeValue, Span, Status
from agl.tokens.packing import pack_ids, pack_logprobs

TRACE = "a" * 32
OTHER_TRACE = "b" * 32
ROLLOUT = "r-1"

_numbers = itertools.count(1)


def span(
    name: str,
    attributes: dict[str, Any] | None = None,
    *,
    parent: Span | None = None,
    trace_id: str = TRACE,
    start: int | None = None,
    status: Status = "unset",
    message: str = "",
) -> Span:
    """A span of rollout r-1 below `parent`, in its trace; spans start in the order they are made."""
    number = next(_numbers)
    start_ns = number * 1_000_000_000 if start is None else start
    return Span(
        trace_id=parent.trace_id if parent else trace_id,
        span_id=f"{number:016x}",
        parent_id=parent.span_id if parent else None,
        name=name,
        start_ns=start_ns,
        end_ns=start_ns + 250_000_000,
        attributes={semconv.ROLLOUT_ID: ROLLOUT} | (attributes or {}),
        status=status,
        status_message=message,
    )


def chat(parent: Span | None = None, attributes: dict[str, Any] | None = None, **options: Any) -> Span:
    """A framework's span of a model request."""
    operation = {semconv.GEN_AI_OPERATION_NAME: semconv.OPERATION_CHAT}
    return span("chat writer", operation | (attributes or {}), parent=parent, **options)


def tokens(prompt: Sequence[int], response: Sequence[int]) -> dict[str, AttributeValue]:
    return {
        semconv.PROMPT_TOKEN_IDS: pack_ids(prompt),
        semconv.RESPONSE_TOKEN_IDS: pack_ids(response),
        semconv.RESPONSE_LOGPROBS: pack_logprobs([-0.5] * len(response)),
    }


def gateway_call(
    prompt: Sequence[int] = (1, 2),
    response: Sequence[int] = (3, 4),
    *,
    parent: Span | None = None,
    role: str | None = None,
    version: str = "writer@3",
    attributes: dict[str, Any] | None = None,
    **options: Any,
) -> Span:
    """The gateway's span of an answered request."""
    own = {
        semconv.GEN_AI_OPERATION_NAME: semconv.OPERATION_CHAT,
        semconv.POLICY_VERSION: version,
        semconv.GEN_AI_RESPONSE_FINISH_REASONS: ["stop"],
    }
    named = {semconv.ROLE: role} if role else {}
    return span(
        semconv.SPAN_GATEWAY_CALL, own | tokens(prompt, response) | named | (attributes or {}), parent=parent, **options
    )


def reward(value: float, attributes: dict[str, Any] | None = None, **options: Any) -> Span:
    return span(semconv.SPAN_REWARD, {semconv.REWARD_VALUE: value} | (attributes or {}), **options)
