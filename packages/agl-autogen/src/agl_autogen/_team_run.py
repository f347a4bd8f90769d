"""Patches of a team: one span for its run, so that the run is one trace, and one for each hand-off."""

import functools
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

from autogen_agentchat.base import TaskResult
from autogen_agentchat.messages import HandoffMessage
from autogen_agentchat.teams._group_chat._base_group_chat_manager import BaseGroupChatManager
from opentelemetry.context import Context, attach, create_key, detach, get_current, set_value
from opentelemetry.instrumentation.utils import is_instrumentation_enabled
from opentelemetry.trace import SpanKind, set_span_in_context

from agl import semconv
from agl.context import stated_role
from agl.failsafe import never_raises
from agl_autogen._settings import Settings
from agl_autogen._span import mark_abandoned, open_span
from agl_autogen._stream import IsolatedStream
from agl_autogen._turn import agent_context

RunStream = Callable[..., AsyncGenerator[Any, None]]
OnMessage = Callable[..., Awaitable[Any]]

_RUN = create_key("agl-autogen-run")
"""Key of a context inside a run: an object of that run's."""
_RUNNING: dict[str, Context] = {}
"""OpenTelemetry context of every current run, by the team's id, which is the key of all its agents in a runtime."""


def traced_run(original: RunStream, settings: Settings) -> RunStream:
    """`BaseGroupChat.run_stream`, which `run` calls as well, in a span of its own, with a span for each hand-off."""

    async def in_span(team: Any, *args: Any, **options: Any) -> AsyncGenerator[Any, None]:
        operation = semconv.OPERATION_INVOKE_WORKFLOW
        attributes = {semconv.GEN_AI_OPERATION_NAME: operation, semconv.GEN_AI_WORKFLOW_NAME: team.name}
        with open_span(settings, f"{operation} {team.name}", SpanKind.INTERNAL, attributes) as span:
            context, finished = set_value(_RUN, object(), set_span_in_context(span)), False
            try:
                stream = IsolatedStream(original(team, *args, **options), context)
                with _registered(team._team_id, context):
                    async with aclosing(stream) as messages:
                        async for message in messages:
                            finished = isinstance(message, TaskResult)
                            if isinstance(message, HandoffMessage):
                                _record_handoff(settings, context, team, message)
                            yield message
            except GeneratorExit:
                if not finished:
                    mark_abandoned(span)
                raise

    @functools.wraps(original)
    def run_stream(team: Any, *args: Any, **options: Any) -> AsyncGenerator[Any, None]:
        return (in_span if is_instrumentation_enabled() else original)(team, *args, **options)

    return run_stream


def in_team_run(original: OnMessage, settings: Settings) -> OnMessage:
    """`on_message` of a team's agents and manager, in the context of the team's run.

    A runtime of the user's handles messages in the context in which it was started: outside of any rollout, or in the
    same rollout beside the run, or in that of another run. A manager may call a model itself, so its role is set here;
    an agent's role is set at the start of its turn.
    """

    @functools.wraps(original)
    async def on_message(agent: Any, *args: Any, **options: Any) -> Any:
        current = get_current()
        context = _handling_context(settings, agent, current)
        if context is current:
            return await original(agent, *args, **options)
        token = attach(context)
        try:
            return await original(agent, *args, **options)
        finally:
            detach(token)

    return on_message


def _handling_context(settings: Settings, agent: Any, current: Context) -> Context:
    """The context in which `agent` handles a message: `current` if that belongs to the run."""
    run = _RUNNING.get(agent.id.key)
    context = current if run is None or run.get(_RUN) is current.get(_RUN) else run
    return agent_context(settings, agent._name, context) if _is_manager(type(agent)) else context


@functools.cache  # agents implement a protocol, and an `isinstance` that fails checks all of its members
def _is_manager(kind: type) -> bool:
    return issubclass(kind, BaseGroupChatManager)


@contextmanager
def _registered(team_id: str, context: Context) -> Iterator[None]:
    """Register a run. AutoGen refuses a second run of a running team; its context must not replace the first one's."""
    _RUNNING.setdefault(team_id, context)
    try:
        yield
    finally:
        if _RUNNING.get(team_id) is context:
            del _RUNNING[team_id]


def _record_handoff(settings: Settings, context: Context, team: Any, message: HandoffMessage) -> None:
    """Record a span of no duration. A message of an inner team also passes the outer team, and is recorded once."""
    with never_raises(f"the hand-off from {message.source!r} to {message.target!r} was not recorded"):
        if message.source not in team._participant_names:
            return
        moment = int(message.created_at.timestamp() * 1e9)
        attributes = {
            semconv.HANDOFF_SOURCE: stated_role(context) or settings.role_of(message.source),
            semconv.HANDOFF_TARGET: stated_role(context) or settings.role_of(message.target),
        }
        span = settings.tracer.start_span(semconv.SPAN_HANDOFF, context, attributes=attributes, start_time=moment)
        span.end(moment)
