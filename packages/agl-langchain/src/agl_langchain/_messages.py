"""LangChain messages as the JSON of the OpenTelemetry GenAI conventions: `{role, parts: [{type, ...}]}`."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, cast

from langchain_core.documents import Document
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.outputs import ChatGeneration, Generation
from pydantic import BaseModel

from agl.content.filter import content_json

Part = dict[str, Any]
Message = dict[str, Any]

_ROLES: dict[type[BaseMessage], str | None] = {
    AIMessage: "assistant",
    HumanMessage: "user",
    SystemMessage: "system",
    ToolMessage: "tool",
    FunctionMessage: "tool",
    ChatMessage: None,
}
_TOOL_CALL_BLOCKS = {"tool_call", "tool_use", "tool_call_chunk", "invalid_tool_call", "function_call"}
"""Content blocks that repeat the tool calls in `message.tool_calls`."""


def input_messages(messages: Sequence[BaseMessage]) -> list[Message]:
    """The messages of a request, in order."""
    return [{"role": _role(message), "parts": _parts(message)} for message in messages]


def prompt_messages(prompt: str) -> list[Message]:
    """The prompt of a completion model, as one user message."""
    return [{"role": "user", "parts": [_text(prompt)]}]


def output_messages(generations: Sequence[Generation]) -> list[Message]:
    """The choices of a response, each with its finish reason."""
    return [
        {"role": "assistant", "parts": _generation_parts(generation), "finish_reason": finish_reason(generation)}
        for generation in generations
    ]


def finish_reason(generation: Generation) -> str:
    """Why the model stopped; empty if neither the choice nor its message has a reason."""
    reason = (generation.generation_info or {}).get("finish_reason")
    if reason is None and isinstance(generation, ChatGeneration):
        metadata = generation.message.response_metadata
        reason = metadata.get("finish_reason") or metadata.get("stop_reason") or _reason_of_status(generation, metadata)
    return str(reason or "")


def _reason_of_status(generation: ChatGeneration, metadata: Mapping[str, Any]) -> str | None:
    """The Responses API states whether an answer is complete, and only for an incomplete one why."""
    if metadata.get("status") == "completed":
        return "tool_calls" if getattr(generation.message, "tool_calls", None) else "stop"
    reason = (metadata.get("incomplete_details") or {}).get("reason")
    return "length" if reason == "max_output_tokens" else reason


def retrieved(documents: Sequence[Document]) -> list[dict[str, Any]]:
    """The documents that a retriever found, best first."""
    return [{"id": item.id, "content": item.page_content, "metadata": item.metadata} for item in documents]


def tool_result(output: Any) -> Any:
    """The result of a tool; of a `ToolMessage`, its content."""
    return output.content if isinstance(output, ToolMessage) else output


def to_json(value: Any) -> str:
    """`value` as JSON. A pydantic model becomes its fields, any other object that JSON has no form for its text."""
    return content_json(value, _as_fields)


def _role(message: BaseMessage) -> str:
    return _role_of(type(message)) or cast(ChatMessage, message).role


def _parts(message: BaseMessage) -> list[Part]:
    return _parts_of(type(message))(message)


# Cached by type: with pydantic, an `isinstance` that fails takes longer than the conversion of a short message.
@cache
def _role_of(kind: type[BaseMessage]) -> str | None:
    """None: the message has a field for it."""
    return next((role for base, role in _ROLES.items() if issubclass(kind, base)), "user")


@cache
def _parts_of(kind: type[BaseMessage]) -> Callable[[Any], list[Part]]:
    if issubclass(kind, ToolMessage):
        return _tool_parts
    return _assistant_parts if issubclass(kind, AIMessage) else _plain_parts


def _tool_parts(message: ToolMessage) -> list[Part]:
    return [{"type": "tool_call_response", "id": message.tool_call_id, "response": message.content}]


def _assistant_parts(message: AIMessage) -> list[Part]:
    calls = [_tool_call(call) for call in (*message.tool_calls, *message.invalid_tool_calls)]
    return _content_parts(message.content) + calls


def _plain_parts(message: BaseMessage) -> list[Part]:
    return _content_parts(message.content)


def _generation_parts(generation: Generation) -> list[Part]:
    return _parts(generation.message) if isinstance(generation, ChatGeneration) else [_text(generation.text)]


def _tool_call(call: Mapping[str, Any]) -> Part:
    """`arguments` is an object; of an invalid tool call, the text that the model wrote."""
    return {"type": "tool_call", "id": call["id"], "name": call["name"], "arguments": call["args"]}


def _content_parts(content: str | list[str | dict[str, Any]]) -> list[Part]:
    if isinstance(content, str):
        return [_text(content)] if content else []
    return [_block_part(block) for block in content if _is_content(block)]


def _is_content(block: str | dict[str, Any]) -> bool:
    return isinstance(block, str) or block.get("type") not in _TOOL_CALL_BLOCKS


def _block_part(block: str | dict[str, Any]) -> Part:
    """A content block as a part; a type that the conventions do not define stays unchanged."""
    if isinstance(block, str):
        return _text(block)
    kind = block.get("type")
    if kind == "text":
        return _text(block.get("text", ""))
    if kind in ("reasoning", "thinking"):
        return {"type": "reasoning", "content": block.get("reasoning") or block.get("thinking") or ""}
    if kind == "image_url":
        return _image(block["image_url"])
    return block


def _image(image: str | dict[str, Any]) -> Part:
    return {"type": "uri", "modality": "image", "uri": image if isinstance(image, str) else image.get("url", "")}


def _text(content: str) -> Part:
    return {"type": "text", "content": content}


def _as_fields(value: Any) -> Any:
    if isinstance(value, BaseMessage):
        return {"role": _role(value), "parts": _parts(value)}
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else str(value)
