"""Tools of MCP servers: AutoGen turns their errors into answers, and leaves no mark of them on its tool span."""

import functools
from collections.abc import Awaitable, Callable
from typing import Any

from opentelemetry.trace import get_current_span

from agl.content.filter import ContentFilter

Call = Callable[..., Awaitable[Any]]


class McpToolError(Exception):
    """What a server answered that calls its answer an error."""


def marking_errors(original: Call, content: ContentFilter) -> Call:
    """`McpSessionActor.call`: what it returns of a `call_tool` is awaited in the tool's span, which errors mark."""

    async def marked(answer: Awaitable[Any]) -> Any:
        try:
            result = await answer
        except Exception as error:
            content.mark_error(get_current_span(), error)
            raise
        if result.isError:
            said = " ".join(getattr(part, "text", "") for part in result.content)
            content.mark_error(get_current_span(), McpToolError(said))
        return result

    @functools.wraps(original)
    async def call(actor: Any, type: str, *args: Any, **options: Any) -> Any:
        answer = await original(actor, type, *args, **options)
        return marked(answer) if type == "call_tool" else answer

    return call
