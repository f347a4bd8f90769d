"""An agent's turn: a span, inside which the agent's role and name are set on every span that starts."""

import functools
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, aclosing, contextmanager
from typing import Any

from autogen_core import trace_invoke_agent_span
from opentelemetry.context import Context, attach, create_key, detach, get_current, get_value, set_value
from opentelemetry.instrumentation.utils import is_instrumentation_enabled
from opentelemetry.trace import Span

from agl import semconv
from agl.context import with_inferred_role
from agl.failsafe import never_raises
from agl_autogen._settings import Settings
from agl_autogen._span import with_error_marked
from agl_autogen._stream import isolated

TraceFunction = Callable[..., AbstractContextManager[Span]]
"""One of AutoGen's `trace_..._span` functions."""
OnMessages = Callable[..., Awaitable[Any]]
OnMessagesStream = Callable[..., AsyncGenerator[Any, None]]

_AGENT = create_key("agl-autogen-agent")


def current_agent() -> str | None:
    """Name of the agent whose turn it is, or None."""
    name = get_value(_AGENT)
    return name if isinstance(name, str) else None


def agent_context(settings: Settings, agent: str, context: Context) -> Context:
    """`context` with the role and the name of `agent`."""
    with never_raises(f"the role of agent {agent!r} is not on its spans"):
        return with_inferred_role(settings.role_of(agent), set_value(_AGENT, agent, context))
    return context


def traced_agent(original: TraceFunction, settings: Settings) -> TraceFunction:
    """AutoGen's `trace_invoke_agent_span` with the agent's role set inside.

    AutoGen opens this span around every turn in a team and in `run`, but not around a direct call of `on_messages`.
    """

    @functools.wraps(original)
    @contextmanager
    def trace_invoke_agent_span(agent_name: str, **options: Any) -> Iterator[Span]:
        token = attach(agent_context(settings, agent_name, get_current()))
        try:
            with with_error_marked(original(agent_name, **options), settings.content) as span:
                yield span
        finally:
            detach(token)

    return trace_invoke_agent_span


def traced_tool(original: TraceFunction, settings: Settings) -> TraceFunction:
    """AutoGen's `trace_tool_span`, with errors and the tool's description filtered like other content."""

    @functools.wraps(original)
    @contextmanager
    def trace_tool_span(*args: Any, tool_description: str | None = None, **options: Any) -> Iterator[Span]:
        with with_error_marked(original(*args, **options), settings.content) as span:
            if tool_description is not None:
                settings.content.set_content(span, lambda: {semconv.GEN_AI_TOOL_DESCRIPTION: tool_description})
            yield span

    return trace_tool_span


def open_turn(settings: Settings, agent: str, **described: str) -> AbstractContextManager[Span]:
    """The span of a turn for which AutoGen makes none, in the same form as AutoGen's."""
    return traced_agent(trace_invoke_agent_span, settings)(agent, tracer=settings.tracer, **described)


def as_turn(original: OnMessages, settings: Settings) -> OnMessages:
    """`on_messages` of an agent: a turn of its own unless it is part of one."""

    @functools.wraps(original)
    async def on_messages(agent: Any, *args: Any, **options: Any) -> Any:
        if not _starts_turn(agent):
            return await original(agent, *args, **options)
        with open_turn(settings, agent.name, agent_description=agent.description):
            return await original(agent, *args, **options)

    return on_messages


def as_turn_stream(original: OnMessagesStream, settings: Settings) -> OnMessagesStream:
    """`on_messages_stream` of an agent: a turn of its own unless it is part of one."""

    async def in_turn(agent: Any, *args: Any, **options: Any) -> AsyncGenerator[Any, None]:
        with open_turn(settings, agent.name, agent_description=agent.description):
            async with aclosing(original(agent, *args, **options)) as items:
                async for item in items:
                    yield item

    isolated_turn = isolated(in_turn)

    @functools.wraps(original)
    def on_messages_stream(agent: Any, *args: Any, **options: Any) -> AsyncGenerator[Any, None]:
        return (isolated_turn if _starts_turn(agent) else original)(agent, *args, **options)

    return on_messages_stream


def _starts_turn(agent: Any) -> bool:
    """Whether the user calls the agent directly: not its team, not its own `run`, not the agent itself."""
    return is_instrumentation_enabled() and current_agent() != agent.name
