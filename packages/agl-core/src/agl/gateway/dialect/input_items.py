"""Translates the input of the Responses API to the messages of a chat completion."""

import json
from collections.abc import Iterator
from typing import Any, Final

from agl.gateway.dialect.api_field import Fields, check_object, check_type, ignored, refused, translated
from agl.gateway.dialect.translated import tool_call
from agl.tokens.capture import Json

_STORED: Final = refused("the gateway keeps no state; send the content itself")

ITEM_FIELDS: Final[Fields] = {
    "input[]: message": translated("a message; the role `developer` becomes `system`"),
    "input[]: function_call": translated("`tool_calls` of the assistant's message"),
    "input[]: function_call_output": translated("a message of the role `tool`"),
    "input[]: custom_tool_call": translated("`tool_calls` of the assistant's message"),
    "input[]: custom_tool_call_output": translated("a message of the role `tool`"),
    "input[]: reasoning": translated("`reasoning_content` of the assistant's message; refused as the last item"),
    "input[]: item_reference": _STORED,
    "input[].content": translated("`reasoning_content`"),
    "input[].summary": ignored("`content` has the thoughts themselves"),
    "input[].encrypted_content": refused("engines cannot read it; send `content`"),
    "content[]: input_text": translated("text"),
    "content[]: output_text": translated("text, without annotations and logprobs"),
    "content[]: refusal": translated("text"),
    "content[]: input_image": translated("`image_url`"),
    "content[]: input_file": refused("engines read no files; send text or images"),
    "input_image.image_url": translated("`image_url.url`"),
    "input_image.detail": translated("`image_url.detail`"),
    "input_image.file_id": _STORED,
    "input_image.prompt_cache_breakpoint": ignored("engines cache every prefix"),
}
_TEXTS: Final = {"input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Types of content that are text, each with the field that has it."""
_CALLS: Final = ("function_call", "custom_tool_call")
CUSTOM_INPUT: Final = "input"
"""Argument of a function that stands for a custom tool, whose input is a text."""


def to_messages(items: list[Json]) -> Iterator[Json]:
    """The chat messages for input items. A text, and the thoughts and tool calls around it, form one assistant message.

    Raises ValueError for an item without equivalent.
    """
    assistant: Json | None = None
    for item in items:
        kind = check_type(item, "input[]", ITEM_FIELDS, "message")
        is_user = kind.endswith("_output") or (kind == "message" and item["role"] != "assistant")
        is_next_text = kind == "message" and assistant is not None and assistant["content"] is not None
        if assistant is not None and (is_user or is_next_text):
            yield _ended(assistant, is_last=False)
            assistant = None
        if is_user:
            yield _from_user(item) if kind == "message" else _from_tool(item)
        else:
            assistant = assistant or {"role": "assistant", "content": None}
            _add_to_assistant(assistant, kind, item)
    if assistant is not None:
        yield _ended(assistant, is_last=True)


def _ended(assistant: Json, is_last: bool) -> Json:
    """The message, which may consist of thoughts alone if the answer was cut short in them."""
    if assistant["content"] is not None or "tool_calls" in assistant:
        return assistant
    if is_last or "reasoning_content" not in assistant:
        raise ValueError("a reasoning item is without the message or the call that it led to")
    return assistant | {"content": ""}


def _from_user(item: Json) -> Json:
    return {"role": "system" if item["role"] == "developer" else item["role"], "content": _content(item["content"])}


def _from_tool(item: Json) -> Json:
    return {"role": "tool", "tool_call_id": item["call_id"], "content": _content(item["output"])}


def _add_to_assistant(assistant: Json, kind: str, item: Json) -> None:
    if kind == "message":
        assistant["content"] = _content(item["content"])
    elif kind in _CALLS:
        arguments = item["arguments"] if kind == "function_call" else json.dumps({CUSTOM_INPUT: item["input"]})
        assistant.setdefault("tool_calls", []).append(tool_call(item["call_id"], item["name"], arguments))
    else:
        check_object(item, "input[]", ITEM_FIELDS)
        text = "".join(part.get("text") or "" for part in item.get("content") or ())
        if text:
            assistant["reasoning_content"] = assistant.get("reasoning_content", "") + text


def _content(content: Any) -> Any:
    """Content of a chat message: text as a string, with images as parts."""
    if isinstance(content, str):
        return content
    kinds = [check_type(part, "content[]", ITEM_FIELDS) for part in content]
    if all(kind in _TEXTS for kind in kinds):
        return "".join(part[_TEXTS[part["type"]]] for part in content)
    return [_image(part) if part["type"] == "input_image" else _text(part) for part in content]


def _text(part: Json) -> Json:
    return {"type": "text", "text": part[_TEXTS[part["type"]]]}


def _image(part: Json) -> Json:
    check_object(part, "input_image", ITEM_FIELDS)
    url: Json = {"url": part["image_url"]}
    if part.get("detail", "auto") != "auto":
        url["detail"] = part["detail"]
    return {"type": "image_url", "image_url": url}
