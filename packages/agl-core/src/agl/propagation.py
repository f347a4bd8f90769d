"""The rollout, role and trace in other services and processes: W3C `traceparent` and `baggage`."""

import os
from collections.abc import Mapping

from opentelemetry import trace
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.context import Context, attach
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from agl.context import (
    ENTRIES,
    ActiveRollout,
    active_rollout,
    attached,
    carried_attributes,
    carried_entries,
    current_rollout,
    read_baggage,
    with_baggage,
)
from agl.scope import Scope


def headers() -> dict[str, str]:
    """`traceparent` and `baggage` of the current context, for an outgoing HTTP request.

        httpx.post(url, json=body, headers=agl.headers())

    The baggage holds our own entries only, because a request may go to a third party.
    """
    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    if entries := carried_entries(ENTRIES):
        W3CBaggagePropagator().inject(carrier, context=with_baggage(entries, Context()))
        carrier["baggage"] = carrier["baggage"].replace("+", "%20")  # OpenTelemetry writes a space as in a form.
    return carrier


def environment() -> dict[str, str]:
    """`headers` as environment variables for a child process, whose `agl.init()` then continues the rollout.

    Example: `subprocess.run(command, env=os.environ | agl.environment())`
    """
    return {name.upper(): value for name, value in headers().items()}


def joined(carrier: Mapping[str, str]) -> Scope[ActiveRollout | None]:
    """Run the block in the rollout, role and trace that `carrier` names. `with` or `async with`.

        async with agl.joined(request.headers):
            return await agent.ainvoke(task)

    `carrier` holds `traceparent` and `baggage`, names in any case: request headers, or the result of `environment`.
    If it names no rollout, the block runs outside of any rollout.
    """
    context = joined_context(carrier)
    return Scope(attached(context, active_rollout(carried_attributes(context))))


def join_environment() -> None:
    """Continue the rollout of the environment variables until the process ends, unless a rollout is current."""
    context = joined_context(os.environ)
    if current_rollout() is None and active_rollout(carried_attributes(context)):
        attach(context)


def joined_context(carrier: Mapping[str, str]) -> Context:
    """The current context with our entries and the span replaced by those of `carrier`."""
    lowered = {name.lower(): value for name, value in carrier.items()}
    entries = carried_entries(ENTRIES, read_baggage(lowered.get("baggage", "")))
    # Clear the span first: without a traceparent, `extract` would keep the current one.
    rootless = trace.set_span_in_context(trace.INVALID_SPAN)
    return with_baggage(dict.fromkeys(ENTRIES) | entries, TraceContextTextMapPropagator().extract(lowered, rootless))
