"""Patch of MCP tools: AutoGen turns their errors into results, and does not mark them on its tool span."""

import functools
from collections.abc import Awaitable, Callable
from typing import Any

from opentelemetry.trace import get_current_span

from agl.content.filter import ContentFilter

Method = Callable[..., Awaitable[Any]]


class McpToolError(Exception):
    """The text of a result that the server marked as an error."""


def marking_errors(original: Method, content: ContentFilter) -> Method:
    """`McpSessionActor.call`: its result for `call_tool` is awaited in the tool's span, on which errors are marked."""

    async def marked(pending: Awaitable[Any]) -> Any:
        try:
            result = await pending
        except Exception as error:
            content.mark_error(get_current_span(), error)
            raise
        if result.isError:
            text = " ".join(getattr(part, "text", "") for part in result.content)
            content.mark_error(get_current_span(), McpToolError(text))
        return result

    @functools.wraps(original)
    async def call(actor: Any, type: str, *args: Any, **options: Any) -> Any:
        pending = await original(actor, type, *args, **options)
        return marked(pending) if type == "call_tool" else pending

    return call
