"""Which rollout and which role is running: OpenTelemetry baggage, stamped on every span started under it.

Baggage follows `contextvars`: asyncio tasks inherit it, and so do threads started with a copied context (LangChain,
`asyncio.to_thread`). It travels to other services in the W3C `baggage` header, and to other processes in their
environment or with `agl.carry`.
"""

import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Literal, TypeVar, get_args

from opentelemetry import baggage, trace
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.context import Context, attach, detach, get_current
from opentelemetry.sdk.trace import Span, SpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from agl import semconv
from agl.content.content import Content
from agl.errors import TelemetryError
from agl.failsafe import never_raises

Mode = Literal["train", "eval", "prod"]
Value = TypeVar("Value", covariant=True)

TRACER = trace.get_tracer("agl")
"""Tracer of our own spans; follows the global provider once there is one."""

_ATTRIBUTES = (semconv.ROLLOUT_ID, semconv.ATTEMPT_ID, semconv.GROUP_ID, semconv.MODE, semconv.ROLE)
_INFERRED = "agl.role.inferred"
"""Marks a role that nobody stated: a plug-in took it from the name of the agent whose turn it is."""
_ENTRIES = (*_ATTRIBUTES, _INFERRED)


@dataclass(frozen=True, slots=True)
class ActiveRollout:
    """The rollout in force: what its spans are stamped with."""

    rollout_id: str
    attempt_id: str
    group_id: str | None
    mode: str


class Scope(AbstractContextManager[Value], AbstractAsyncContextManager[Value], Generic[Value]):
    """A `with` block that may also be written `async with`: nothing in it waits. For one use."""

    def __init__(self, scope: AbstractContextManager[Value]) -> None:
        self._scope = scope

    def __enter__(self) -> Value:
        return self._scope.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return self._scope.__exit__(kind, error, traceback)

    async def __aenter__(self) -> Value:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return self.__exit__(kind, error, traceback)


def rollout(
    rollout_id: str | None = None,
    *,
    group_id: str | None = None,
    attempt_id: str | None = None,
    mode: Mode = "train",
) -> Scope[ActiveRollout]:
    """Run the block as one rollout: every span started in it carries the ids. `with` or `async with`.

    Missing ids are made: a random rollout id, and `<rollout_id>-a1` as the attempt. The block gets a trace of its own,
    linked to the span it was started under, so that two rollouts never share a trace. An exception marks the
    rollout's span as an error and goes on unchanged. Raises TelemetryError for an empty id or an unknown mode.
    """
    if mode not in get_args(Mode):
        raise TelemetryError(f"rollout mode is {mode!r}, expected one of {', '.join(get_args(Mode))}")
    rollout_id = non_empty("rollout_id", uuid.uuid4().hex if rollout_id is None else rollout_id)
    attempt_id = non_empty("attempt_id", f"{rollout_id}-a1" if attempt_id is None else attempt_id)
    if group_id is not None:
        non_empty("group_id", group_id)
    return Scope(_run_rollout(ActiveRollout(rollout_id, attempt_id, group_id, mode)))


def role(name: str) -> Scope[str]:
    """Name the role that acts in the block: every span started in it carries it. `with` or `async with`.

    Raises TelemetryError for a name that is not a non-empty string.
    """
    return Scope(_carry({semconv.ROLE: non_empty("role", name), _INFERRED: None}, name))


def current_rollout() -> ActiveRollout | None:
    """The rollout in force, here or in the caller whose baggage came with the request; None outside of one."""
    return _active(carried_attributes())


def current_role() -> str | None:
    """The role in force, or None."""
    return carried_attributes().get(semconv.ROLE)


def stated_role(context: Context | None = None) -> str | None:
    """The role that `agl.role` states in `context` (default: the current one). It counts more than any agent's name."""
    carried = baggage.get_all(context)
    role = carried.get(semconv.ROLE)
    return role if isinstance(role, str) and role and not carried.get(_INFERRED) else None


def with_inferred_role(name: str, context: Context) -> Context:
    """`context`, in which an agent acts whose role is `name` where none is stated. An agent inside it has its own."""
    return context if stated_role(context) else _with_baggage({semconv.ROLE: name, _INFERRED: "true"}, context)


def headers() -> dict[str, str]:
    """W3C `traceparent` and `baggage` of the current context, to put on an outgoing request.

    Only our own baggage entries are sent: a request often goes to a third party.
    """
    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    if carried := _carried(_ENTRIES):
        W3CBaggagePropagator().inject(carrier, context=_with_baggage(carried, Context()))
    return carrier


def environment() -> dict[str, str]:
    """The same as environment variables, for a process to be started: `agl.init()` there goes on in the rollout."""
    return {name.upper(): value for name, value in headers().items()}


def joined(carrier: Mapping[str, str]) -> Scope[ActiveRollout | None]:
    """Run the block in the rollout, the role and the trace that `carrier` names. `with` or `async with`.

    `carrier` holds `traceparent` and `baggage` in any case: the headers of a request, or what `environment` gave. Where
    it names no rollout there is none in the block.
    """
    context = _joined_context(carrier)
    return Scope(_attached(context, _active(carried_attributes(context))))


def join_environment() -> None:
    """Go on, for as long as the process lives, in the rollout that its environment names, if none is in force."""
    context = _joined_context(os.environ)
    if current_rollout() is None and _active(carried_attributes(context)):
        attach(context)


def carried_attributes(context: Context | None = None) -> dict[str, str]:
    """Span attributes that the baggage of `context` (default: the current one) asks for."""
    return _carried(_ATTRIBUTES, context)


def non_empty(name: str, value: str) -> str:
    """`value`, if it is text. Raises TelemetryError that calls it `name`."""
    if not isinstance(value, str) or not value.strip():
        raise TelemetryError(f"{name} is {value!r}, expected a non-empty string")
    return value


class RolloutProcessor(SpanProcessor):
    """Stamps rollout, attempt, group, mode and role on every span at its start, whoever starts it.

    An attribute that the span already has stays as it is.
    """

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        carried = carried_attributes(parent_context)
        if carried:
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
    """A span around the block, current in it. An exception of the block marks it and goes on unchanged."""
    span = TRACER.start_span(name, context, attributes=attributes, links=links)
    with ending(span), trace.use_span(span, record_exception=False, set_status_on_exception=False):
        yield span


@contextmanager
def ending(span: trace.Span) -> Iterator[trace.Span]:
    """End `span` with the block; an exception of the block marks it and goes on unchanged."""
    try:
        yield span
    except GeneratorExit:  # a generator closed by its reader ends early, it does not fail
        raise
    except BaseException as error:
        mark_error(span, error, Content.of())
        raise
    finally:
        span.end()


def mark_error(span: trace.Span, error: BaseException, content: Content) -> None:
    """Give `span` the status error, `error.type` and the exception as an event, as far as `content` lets it speak."""
    with never_raises("an exception was not recorded"):
        span.set_attribute(semconv.ERROR_TYPE, type(error).__qualname__)
        status, event = content.of_error(error)
        span.set_status(trace.Status(trace.StatusCode.ERROR, status))
        span.add_event("exception", event)


@contextmanager
def _run_rollout(active: ActiveRollout) -> Iterator[ActiveRollout]:
    carried = {
        semconv.ROLLOUT_ID: active.rollout_id,
        semconv.ATTEMPT_ID: active.attempt_id,
        semconv.GROUP_ID: active.group_id,
        semconv.MODE: active.mode,
    }
    outer = trace.get_current_span().get_span_context()
    with (
        _carry(carried, active),
        open_span(
            semconv.SPAN_ROLLOUT,
            {semconv.GEN_AI_OPERATION_NAME: semconv.OPERATION_INVOKE_WORKFLOW},
            context=trace.set_span_in_context(trace.INVALID_SPAN),
            links=[trace.Link(outer)] if outer.is_valid else [],
        ),
    ):
        yield active


@contextmanager
def _carry(entries: Mapping[str, str | None], value: Value) -> Iterator[Value]:
    """Baggage `entries` in force in the block, which receives `value`. An entry of None is taken out."""
    with _attached(_with_baggage(entries, get_current()), value):
        yield value


@contextmanager
def _attached(context: Context, value: Value) -> Iterator[Value]:
    token = attach(context)
    try:
        yield value
    finally:
        detach(token)


def _active(carried: Mapping[str, str]) -> ActiveRollout | None:
    rollout_id = carried.get(semconv.ROLLOUT_ID)
    if rollout_id is None:
        return None
    attempt_id = carried.get(semconv.ATTEMPT_ID, f"{rollout_id}-a1")
    return ActiveRollout(rollout_id, attempt_id, carried.get(semconv.GROUP_ID), carried.get(semconv.MODE, "train"))


def _joined_context(carrier: Mapping[str, str]) -> Context:
    """The current context with our entries, and the span, of `carrier` alone."""
    lowered = {name.lower(): value for name, value in carrier.items()}
    named = _carried(_ENTRIES, W3CBaggagePropagator().extract(lowered, Context()))
    # The span before: where `carrier` has no traceparent, extraction would leave the current one.
    rootless = trace.set_span_in_context(trace.INVALID_SPAN)
    return _with_baggage(dict.fromkeys(_ENTRIES) | named, TraceContextTextMapPropagator().extract(lowered, rootless))


def _carried(names: Sequence[str], context: Context | None = None) -> dict[str, str]:
    """The entries of the baggage that are text, of these."""
    carried = baggage.get_all(context)
    if not carried:
        return {}
    return {key: str(value) for key in names if isinstance(value := carried.get(key), str) and value}


def _with_baggage(entries: Mapping[str, str | None], context: Context) -> Context:
    for key, entry in entries.items():
        context = baggage.remove_baggage(key, context) if entry is None else baggage.set_baggage(key, entry, context)
    return context
