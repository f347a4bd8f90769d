"""Core agents: every message that one handles is a turn, below the turn that the message was sent in.

A runtime handles messages in the context of its start: in no rollout, or in that of another run.
"""

import functools
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import Any

from opentelemetry.context import attach, detach
from opentelemetry.instrumentation.utils import is_instrumentation_enabled

from agl_autogen._bus import sender_context
from agl_autogen._settings import Settings
from agl_autogen._turn import open_turn

OnMessage = Callable[..., Awaitable[Any]]


def handled(original: OnMessage, settings: Settings) -> OnMessage:
    """`on_message` of a core agent as a turn, in the context that the message was sent in."""

    @functools.wraps(original)
    async def on_message(agent: Any, *args: Any, **options: Any) -> Any:
        context = sender_context()
        with ExitStack() as turn:
            if context is not None:
                turn.callback(detach, attach(context))
            if is_instrumentation_enabled():
                described = {"agent_id": str(agent.id), "agent_description": agent.metadata["description"]}
                turn.enter_context(open_turn(settings, agent.id.type, **described))
            return await original(agent, *args, **options)

    return on_message
