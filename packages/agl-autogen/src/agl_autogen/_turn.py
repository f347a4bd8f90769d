"""An agent's turn: the role, in force on every span that starts in it."""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from opentelemetry.context import attach, create_key, detach, get_value, set_value
from opentelemetry.trace import Span

import agl
from agl.boundary import never_raises
from agl_autogen._settings import Settings

_AGENT = create_key("agl-autogen-agent")


def current_agent() -> str | None:
    """Name of the agent whose turn it is, or None."""
    name = get_value(_AGENT)
    return name if isinstance(name, str) else None


def in_role(
    original: Callable[..., AbstractContextManager[Span]], settings: Settings
) -> Callable[..., AbstractContextManager[Span]]:
    """AutoGen's `trace_invoke_agent_span`, entered with the agent's role in force.

    AutoGen opens this span around every turn, in a team and alone, so it is the one place where turns begin.
    """

    @functools.wraps(original)
    @contextmanager
    def trace_invoke_agent_span(agent_name: str, **options: Any) -> Iterator[Span]:
        with ExitStack() as turn:
            with never_raises(f"the role of agent {agent_name!r} is not on its spans"):
                turn.enter_context(agl.role(settings.role_of(agent_name)))
                turn.callback(detach, attach(set_value(_AGENT, agent_name)))
            with original(agent_name, **options) as span:
                yield span

    return trace_invoke_agent_span
