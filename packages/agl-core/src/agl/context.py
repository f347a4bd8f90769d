"""The current rollout and role: OpenTelemetry baggage, copied onto every span that starts while they are current.

Baggage follows `contextvars`: asyncio tasks inherit it, and so do threads started with a copied context (LangChain's,
`asyncio.to_thread`). `agl.propagation` takes it to other services and processes, `agl.carry` to the workers of a pool.
"""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

from opentelemetry import baggage, trace
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.context import Context, attach, detach, get_current
from opentelemetry.sdk.trace import Span, SpanProcessor
from opentelemetry.util.types import AttributeValue

from agl import semconv
from agl.content.filter import ContentFilter
from agl.errors import TelemetryError
from agl.scope import Scope
from agl.span import now_ns

Mode = Literal["train", "eval", "prod"]
Value = TypeVar("Value")

TRACER = trace.get_tracer("agl")
"""Tracer of our own spans. It uses the global provider, also if that is set later."""

_SPAN_ATTRIBUTES = (semconv.ROLLOUT_ID, semconv.ATTEMPT_ID, semconv.GROUP_ID, semconv.MODE, semconv.ROLE)
_INFERRED = "agl.role.inferred"
"""Baggage entry that marks the role as a plug-in's guess from the current agent's name, not one set by `agl.role`."""
ENTRIES = (*_SPAN_ATTRIBUTES, _INFERRED, semconv.USER)
"""All baggage entries of ours."""


@dataclass(frozen=True, slots=True)
class ActiveRollout:
    """The current rollout, whose ids its spans carry."""

    rollout_id: str
    attempt_id: str
    group_id: str | None
    mode: str


def rollout(
    rollout_id: str | None = None,
    *,
    group_id: str | None = None,
    attempt_id: str | None = None,
    mode: Mode = "train",
    user: str | None = None,
) -> Scope[ActiveRollout]:
    """Run the block as one rollout: every span started in it carries the ids. `with` or `async with`.

        with agl.rollout("task-17-a", group_id="task-17") as rollout:
            agent.invoke(task)
            agl.emit_reward(1.0)

    `user` is whom the agent serves: a gateway reads it, and no span has it.
    Default ids: a random `rollout_id`, and `<rollout_id>-a1` for `attempt_id`. The rollout starts a new trace, linked
    to the current span, so two rollouts never share a trace. An exception sets the status ERROR on the rollout's span
    and propagates. Raises TelemetryError for an empty id or an unknown mode.
    """
    if mode not in get_args(Mode):
        raise TelemetryError(f"rollout mode is {mode!r}, expected one of {', '.join(get_args(Mode))}")
    rollout_id = non_empty("rollout_id", uuid.uuid4().hex if rollout_id is None else rollout_id)
    attempt_id = non_empty("attempt_id", f"{rollout_id}-a1" if attempt_id is None else attempt_id)
    if group_id is not None:
        non_empty("group_id", group_id)
    served = {} if user is None else {semconv.USER: non_empty("user", user)}
    return Scope(_run_rollout(ActiveRollout(rollout_id, attempt_id, group_id, mode), served))


def role(name: str) -> Scope[str]:
    """Set the agent's role for the block: every span started in it carries the role. `with` or `async with`.

        with agl.role("planner"):
            plan = model.invoke(task)

    Takes precedence over roles that plug-ins infer. Raises TelemetryError if `name` is not a non-empty string.
    """
    return Scope(_with_entries({semconv.ROLE: non_empty("role", name), _INFERRED: None}, name))


def current_rollout() -> ActiveRollout | None:
    """The current rollout, of this process or received with a request; None outside of any rollout."""
    return active_rollout(carried_attributes())


def current_role() -> str | None:
    """The current role, or None."""
    return carried_attributes().get(semconv.ROLE)


def stated_role(context: Context | None = None) -> str | None:
    """The role set by `agl.role` in `context` (default: the current one). It overrides roles inferred from names."""
    entries = baggage.get_all(context)
    role = entries.get(semconv.ROLE)
    return role if isinstance(role, str) and role and not entries.get(_INFERRED) else None


def with_inferred_role(name: str | None, context: Context) -> Context:
    """`context` with the role `name` (None: without one), unless `agl.role` set one.

    An agent nested inside may infer its own role.
    """
    inferred = {semconv.ROLE: name, _INFERRED: name and "true"}
    return context if stated_role(context) else with_baggage(inferred, context)


def read_baggage(header: str) -> Context:
    """A context with the entries of a `baggage` header (W3C: `+` is itself, properties after `;` are not the value)."""
    entries = (entry.partition(";")[0] for entry in header.replace("+", "%2B").split(","))
    return W3CBaggagePropagator().extract({"baggage": ",".join(entries)}, Context())


def carried_attributes(context: Context | None = None) -> dict[str, str]:
    """Span attributes for the rollout and role in `context` (default: the current one)."""
    return carried_entries(_SPAN_ATTRIBUTES, context)


def non_empty(name: str, value: str) -> str:
    """`value` unchanged. Raises TelemetryError, naming it `name`, if it is not a non-empty string."""
    if not isinstance(value, str) or not value.strip():
        raise TelemetryError(f"{name} is {value!r}, expected a non-empty string")
    return value


class RolloutProcessor(SpanProcessor):
    """Sets rollout, attempt, group, mode and role on every span at its start; attributes that it already has stay."""

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        if carried := carried_attributes(parent_context):
            own = span.attributes or {}
            span.set_attributes({key: value for key, value in carried.items() if key not in own})


@contextmanager
def open_span(
    name: str,
    attributes: Mapping[str, AttributeValue] | None = None,
    *,
    context: Context | None = None,
    links: Sequence[trace.Link] = (),
) -> Iterator[trace.Span]:
    """Start a span that is current in the block and ends with it. An exception is recorded and propagates."""
    span = TRACER.start_span(name, context, attributes=attributes, links=links, start_time=now_ns())
    with ending(span), trace.use_span(span, record_exception=False, set_status_on_exception=False):
        yield span


@contextmanager
def ending(span: trace.Span) -> Iterator[trace.Span]:
    """End `span` after the block. An exception is recorded and propagates."""
    try:
        yield span
    except GeneratorExit:  # a generator that its reader closes ends early; that is not an error
        raise
    except BaseException as error:
        ContentFilter.of().mark_error(span, error)
        raise
    finally:
        span.end(now_ns())


@contextmanager
def attached(context: Context, value: Value) -> Iterator[Value]:
    """Make `context` the current one in the block, which receives `value`."""
    token = attach(context)
    try:
        yield value
    finally:
        detach(token)


def active_rollout(attributes: Mapping[str, str]) -> ActiveRollout | None:
    """The rollout that `carried_attributes` describes; None if there is no rollout id."""
    rollout_id = attributes.get(semconv.ROLLOUT_ID)
    if rollout_id is None:
        return None
    attempt_id = attributes.get(semconv.ATTEMPT_ID, f"{rollout_id}-a1")
    group_id, mode = attributes.get(semconv.GROUP_ID), attributes.get(semconv.MODE, "train")
    return ActiveRollout(rollout_id, attempt_id, group_id, mode)


def carried_entries(names: Sequence[str], context: Context | None = None) -> dict[str, str]:
    """The baggage entries of `context` with these names whose value is a non-empty string."""
    entries = baggage.get_all(context)
    if not entries:
        return {}
    return {key: str(value) for key in names if isinstance(value := entries.get(key), str) and value}


def with_baggage(entries: Mapping[str, str | None], context: Context) -> Context:
    """`context` with these baggage entries. None removes an entry."""
    for key, entry in entries.items():
        context = baggage.remove_baggage(key, context) if entry is None else baggage.set_baggage(key, entry, context)
    return context


@contextmanager
def _run_rollout(active: ActiveRollout, served: Mapping[str, str]) -> Iterator[ActiveRollout]:
    entries = {
        **served,
        semconv.ROLLOUT_ID: active.rollout_id,
        semconv.ATTEMPT_ID: active.attempt_id,
        semconv.GROUP_ID: active.group_id,
        semconv.MODE: active.mode,
    }
    outer = trace.get_current_span().get_span_context()
    with (
        _with_entries(entries, active),
        open_span(
            semconv.SPAN_ROLLOUT,
            {semconv.GEN_AI_OPERATION_NAME: semconv.OPERATION_INVOKE_WORKFLOW},
            context=trace.set_span_in_context(trace.INVALID_SPAN),
            links=[trace.Link(outer)] if outer.is_valid else [],
        ),
    ):
        yield active


@contextmanager
def _with_entries(entries: Mapping[str, str | None], value: Value) -> Iterator[Value]:
    """Set baggage entries for the block, which receives `value`. None removes an entry."""
    with attached(with_baggage(entries, get_current()), value):
        yield value
