"""An agent's turn: who acts, in force on every span that starts in it."""

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
from agl_autogen._span import marked_once
from agl_autogen._stream import isolated

SpanOf = Callable[..., AbstractContextManager[Span]]
"""One of AutoGen's `trace_..._span` functions."""
OnMessages = Callable[..., Awaitable[Any]]
OnMessagesStream = Callable[..., AsyncGenerator[Any, None]]

_AGENT = create_key("agl-autogen-agent")


def current_agent() -> str | None:
    """Name of the agent whose turn it is, or None."""
    name = get_value(_AGENT)
    return name if isinstance(name, str) else None


@contextmanager
def acting(settings: Settings, agent: str) -> Iterator[None]:
    """The block is of `agent`: its role and its name are in force."""
    token = attach(acting_context(settings, agent, get_current()))
    try:
        yield
    finally:
        detach(token)


def acting_context(settings: Settings, agent: str, context: Context) -> Context:
    """`context`, with the role and the name of `agent` in force."""
    with never_raises(f"the role of agent {agent!r} is not on its spans"):
        named = set_value(_AGENT, agent, context)
        return with_inferred_role(settings.role_of(agent), named)
    return context


def in_role(original: SpanOf, settings: Settings) -> SpanOf:
    """AutoGen's `trace_invoke_agent_span`, entered with the agent's role in force.

    AutoGen opens this span around every turn, in a team and alone, but for those that the user asks for directly.
    """

    @functools.wraps(original)
    @contextmanager
    def trace_invoke_agent_span(agent_name: str, **options: Any) -> Iterator[Span]:
        with acting(settings, agent_name), marked_once(original(agent_name, **options), settings.content) as span:
            yield span

    return trace_invoke_agent_span


def as_content(original: SpanOf, settings: Settings) -> SpanOf:
    """AutoGen's `trace_tool_span`: its errors, and what it says of the tool, as far as the user lets them be told."""

    @functools.wraps(original)
    @contextmanager
    def trace_tool_span(*args: Any, tool_description: str | None = None, **options: Any) -> Iterator[Span]:
        with marked_once(original(*args, **options), settings.content) as span:
            if tool_description is not None:
                settings.content.set_content(span, lambda: {semconv.GEN_AI_TOOL_DESCRIPTION: tool_description})
            yield span

    return trace_tool_span


def open_turn(settings: Settings, agent: str, **described: str) -> AbstractContextManager[Span]:
    """A turn that AutoGen makes no span for: one of the same shape, with the agent's role in force."""
    return in_role(trace_invoke_agent_span, settings)(agent, tracer=settings.tracer, **described)


def turn(original: OnMessages, settings: Settings) -> OnMessages:
    """`on_messages` of an agent, as a turn of its own where it is not part of one."""

    @functools.wraps(original)
    async def on_messages(agent: Any, *args: Any, **options: Any) -> Any:
        if not _begins_a_turn(agent):
            return await original(agent, *args, **options)
        with open_turn(settings, agent.name, agent_description=agent.description):
            return await original(agent, *args, **options)

    return on_messages


def turn_stream(original: OnMessagesStream, settings: Settings) -> OnMessagesStream:
    """`on_messages_stream` of an agent, as a turn of its own where it is not part of one."""

    async def in_turn(agent: Any, *args: Any, **options: Any) -> AsyncGenerator[Any, None]:
        with open_turn(settings, agent.name, agent_description=agent.description):
            async with aclosing(original(agent, *args, **options)) as items:
                async for item in items:
                    yield item

    isolated_turn = isolated(in_turn)

    @functools.wraps(original)
    def on_messages_stream(agent: Any, *args: Any, **options: Any) -> AsyncGenerator[Any, None]:
        return (isolated_turn if _begins_a_turn(agent) else original)(agent, *args, **options)

    return on_messages_stream


def _begins_a_turn(agent: Any) -> bool:
    """Whether the user asks the agent directly: not its team, its own `run`, nor the agent itself."""
    return is_instrumentation_enabled() and current_agent() != agent.name
