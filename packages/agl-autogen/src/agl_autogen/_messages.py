"""AutoGen's model messages and tools as the JSON of the OpenTelemetry GenAI conventions."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from autogen_core import FunctionCall, Image
from autogen_core.models import (
    AssistantMessage,
    CreateResult,
    FunctionExecutionResultMessage,
    LLMMessage,
    SystemMessage,
)
from autogen_core.tools import Tool, ToolSchema

from agl.emit.attributes import json_text

Part = dict[str, Any]


def input_messages(messages: Iterable[LLMMessage]) -> str:
    """JSON list of `{role, parts}`, in the order of `messages`."""
    return _json([_message(message) for message in messages])


def output_messages(result: CreateResult) -> str:
    """JSON list with the one answer as `{role, parts, finish_reason}`."""
    parts = _assistant_parts(result.content, result.thought)
    return _json([{"role": "assistant", "parts": parts, "finish_reason": finish_reason(result)}])


def finish_reason(result: CreateResult) -> str:
    """As OpenAI names it: AutoGen says `function_calls` for `tool_calls`."""
    return "tool_calls" if result.finish_reason == "function_calls" else result.finish_reason


def tool_definitions(tools: Iterable[Tool | ToolSchema]) -> str:
    """JSON list of `{type, name, description, parameters}`."""
    schemas = [tool.schema if isinstance(tool, Tool) else tool for tool in tools]
    return _json([{"type": "function", **schema} for schema in schemas])


def _message(message: LLMMessage) -> dict[str, Any]:
    if isinstance(message, SystemMessage):
        return {"role": "system", "parts": [_text(message.content)]}
    if isinstance(message, AssistantMessage):
        return {"role": "assistant", "parts": _assistant_parts(message.content, message.thought)}
    if isinstance(message, FunctionExecutionResultMessage):
        return {
            "role": "tool",
            "parts": [{"type": "tool_call_response", "id": r.call_id, "response": r.content} for r in message.content],
        }
    content = [message.content] if isinstance(message.content, str) else message.content
    return {"role": "user", "parts": [_user_part(item) for item in content]}


def _assistant_parts(content: str | Sequence[FunctionCall], thought: str | None) -> list[Part]:
    """AutoGen keeps two things in `thought`: the reasoning before a text, and the text beside tool calls."""
    if isinstance(content, str):
        reasoning = [{"type": "reasoning", "content": thought}] if thought else []
        return [*reasoning, _text(content)]
    said = [_text(thought)] if thought else []
    return [*said, *(_tool_call(call) for call in content)]


def _tool_call(call: FunctionCall) -> Part:
    return {"type": "tool_call", "id": call.id, "name": call.name, "arguments": _arguments(call.arguments)}


def _arguments(arguments: str) -> Any:
    """The arguments as JSON, or as the model wrote them where that is no JSON."""
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def _user_part(item: str | Image) -> Part:
    """An image is named without its bytes: they would be many times the rest of the span."""
    return _text(item) if isinstance(item, str) else {"type": "blob", "modality": "image"}


def _text(content: str) -> Part:
    return {"type": "text", "content": content}


def _json(value: Any) -> str:
    return json_text("a message or a tool", value, default=str)
