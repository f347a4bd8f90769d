"""AutoGen's model messages and tools as the JSON of the OpenTelemetry GenAI conventions."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from autogen_core import FunctionCall, Image
from autogen_core.models import CreateResult, FunctionExecutionResult, LLMMessage
from autogen_core.tools import Tool, ToolSchema

from agl.content.json_text import content_json

Part = dict[str, Any]


def input_messages(messages: Iterable[LLMMessage]) -> str:
    """JSON list of `{role, parts}`, in the order of `messages`."""
    return content_json([_message(message) for message in messages])


def output_messages(result: CreateResult) -> str:
    """JSON list with the one answer as `{role, parts, finish_reason}`."""
    parts = _assistant_parts(result.content, result.thought)
    return content_json([{"role": "assistant", "parts": parts, "finish_reason": finish_reason(result)}])


def finish_reason(result: CreateResult) -> str:
    """As OpenAI names it: AutoGen says `function_calls` for `tool_calls`."""
    return "tool_calls" if result.finish_reason == "function_calls" else result.finish_reason


def tool_definitions(tools: Iterable[Tool | ToolSchema]) -> str:
    """JSON list of `{type, name, description, parameters}`."""
    # a schema is a dict; to ask whether a thing is a Tool, a protocol, takes longer than to write its schema
    schemas = [tool if isinstance(tool, dict) else tool.schema for tool in tools]
    return content_json([{"type": "function", **schema} for schema in schemas])


def _message(message: LLMMessage) -> dict[str, Any]:
    # by the type that it names: pydantic makes every `isinstance` that says no take longer than a short message
    match message.type:
        case "SystemMessage":
            return {"role": "system", "parts": [_text(message.content)]}
        case "AssistantMessage":
            return {"role": "assistant", "parts": _assistant_parts(message.content, message.thought)}
        case "FunctionExecutionResultMessage":
            return {"role": "tool", "parts": [_tool_result(result) for result in message.content]}
        case "UserMessage":
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


def _tool_result(result: FunctionExecutionResult) -> Part:
    return {"type": "tool_call_response", "id": result.call_id, "response": result.content}


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
