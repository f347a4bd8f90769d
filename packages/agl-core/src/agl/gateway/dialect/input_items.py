"""Translates the input of the Responses API to the messages of a chat completion."""

from collections.abc import Iterator
from typing import Any, Final

from agl.gateway.dialect.translated import tool_call
from agl.tokens.capture import Json

_PARTS: Final = {"input_text": "text", "output_text": "text", "refusal": "refusal"}


def to_messages(items: list[Json]) -> Iterator[Json]:
    """The chat messages for input items; a text and the tool calls that follow it form one assistant message."""
    assistant: Json | None = None
    for item in items:
        kind = item.get("type", "message")
        if (kind == "message" and item["role"] != "assistant") or kind == "function_call_output":
            if assistant is not None:
                yield assistant
            assistant = None
            yield _from_user(item) if kind == "message" else _from_tool(item)
            continue
        if assistant is None or (kind == "message" and assistant["content"] is not None):
            if assistant is not None:
                yield assistant
            assistant = {"role": "assistant", "content": None}
        _add_to_assistant(assistant, kind, item)
    if assistant is not None:
        yield assistant


def _from_user(item: Json) -> Json:
    return {"role": "system" if item["role"] == "developer" else item["role"], "content": _content(item["content"])}


def _from_tool(item: Json) -> Json:
    return {"role": "tool", "tool_call_id": item["call_id"], "content": _content(item["output"])}


def _add_to_assistant(assistant: Json, kind: str, item: Json) -> None:
    if kind == "message":
        assistant["content"] = _content(item["content"])
    elif kind == "function_call":
        calls: list[Json] = assistant.setdefault("tool_calls", [])
        calls.append(tool_call(item["call_id"], item["name"], item["arguments"]))
    elif kind == "reasoning":
        text = "".join(part.get("text") or "" for part in item.get("content") or ())
        if text:
            assistant["reasoning_content"] = assistant.get("reasoning_content", "") + text
    else:
        raise ValueError(f"engines know no input item of type {kind!r}")


def _content(content: Any) -> Any:
    """Content of a chat message: text as a string, with images as parts."""
    if isinstance(content, str):
        return content
    unknown = {part["type"] for part in content} - {*_PARTS, "input_image"}
    if unknown:
        raise ValueError(f"engines know no content of type {', '.join(sorted(unknown))}")
    if all(part["type"] in _PARTS for part in content):
        return "".join(part[_PARTS[part["type"]]] for part in content)
    return [
        {"type": "image_url", "image_url": {"url": part["image_url"]}}
        if part["type"] == "input_image"
        else {"type": "text", "text": part[_PARTS[part["type"]]]}
        for part in content
    ]
