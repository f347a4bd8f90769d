"""AutoGen's model messages and tools as the JSON of the OpenTelemetry GenAI conventions."""

import json
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from autogen_core import FunctionCall, Image
from autogen_core.models import CreateResult, FunctionExecutionResult, LLMMessage
from autogen_core.tools import Tool, ToolSchema

from agl.content.filter import content_json

Part = dict[str, Any]

_DATA_URLS: WeakKeyDictionary[Image, str] = WeakKeyDictionary()


def input_messages(messages: Iterable[LLMMessage]) -> str:
    """JSON list of `{role, parts}`, in the order of `messages`."""
    return content_json([_message(message) for message in messages])


def output_messages(result: CreateResult) -> str:
    """JSON list with one message `{role, parts, finish_reason}`."""
    parts = _assistant_parts(result.content, result.thought)
    return content_json([{"role": "assistant", "parts": parts, "finish_reason": finish_reason(result)}])


def finish_reason(result: CreateResult) -> str:
    """OpenAI's name of the reason: AutoGen's `function_calls` is `tool_calls`."""
    return "tool_calls" if result.finish_reason == "function_calls" else result.finish_reason


def tool_definitions(tools: Iterable[Tool | ToolSchema]) -> str:
    """JSON list of `{type, name, description, parameters}`."""
    # test for dict, not for Tool: `isinstance` on a protocol takes longer than writing the schema
    schemas = [tool if isinstance(tool, dict) else tool.schema for tool in tools]
    return content_json([{"type": "function", **schema} for schema in schemas])


def _message(message: LLMMessage) -> dict[str, Any]:
    # by its `type` field: with pydantic, an `isinstance` that fails takes longer than converting a short message
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
    """`thought` is the reasoning before a text, or the text beside tool calls."""
    if isinstance(content, str):
        reasoning = [{"type": "reasoning", "content": thought}] if thought else []
        return [*reasoning, _text(content)]
    text = [_text(thought)] if thought else []
    return [*text, *(_tool_call(call) for call in content)]


def _tool_call(call: FunctionCall) -> Part:
    return {"type": "tool_call", "id": call.id, "name": call.name, "arguments": _arguments(call.arguments)}


def _tool_result(result: FunctionExecutionResult) -> Part:
    return {"type": "tool_call_response", "id": result.call_id, "response": result.content}


def _arguments(arguments: str) -> Any:
    """The arguments as a JSON value, or the model's text if it is not JSON."""
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def _user_part(item: str | Image) -> Part:
    return _text(item) if isinstance(item, str) else {"type": "uri", "modality": "image", "uri": _data_url(item)}


def _data_url(image: Image) -> str:
    """Encoded once, because an image stays in the messages of all later calls, and encoding takes milliseconds."""
    if image not in _DATA_URLS:
        _DATA_URLS[image] = image.data_uri
    return _DATA_URLS[image]


def _text(content: str) -> Part:
    return {"type": "text", "content": content}
