"""OpenAI's Responses API (`/v1/responses`), translated to chat completions; no state is kept between calls."""

import json
import time
from typing import Any, Final

from agl.gateway.dialect.api_field import (
    PASSED_ON,
    Fields,
    check_object,
    check_type,
    ignored,
    passed_on,
    refused,
    translated,
)
from agl.gateway.dialect.dialect import to_event
from agl.gateway.dialect.input_items import CUSTOM_INPUT, ITEM_FIELDS, to_messages
from agl.gateway.dialect.translated import Translated, function_tool
from agl.server.api_error import ApiError
from agl.tokens.capture import CapturedToolCall, Json

_STATE: Final = refused("the gateway keeps no state between calls; send the whole input instead")
_ACCOUNT: Final = ignored("it is about the provider's account, capacity or cache")
_FIELDS: Final[Fields] = {
    "model": translated("`model`, by `gateway.models`"),
    "input": translated("`messages`"),
    "instructions": translated("the first message"),
    "max_output_tokens": translated("`max_tokens`"),
    "temperature": PASSED_ON,
    "top_p": PASSED_ON,
    "user": PASSED_ON,
    "parallel_tool_calls": PASSED_ON,
    "stream": translated("`stream`, and `stream_options.include_usage`"),
    "stream_options": ignored("it is about padding of events"),
    "include": translated("`logprobs`, for `message.output_text.logprobs`; other values are about tools of a provider"),
    "top_logprobs": translated("`top_logprobs`"),
    "reasoning": translated("by its fields"),
    "reasoning.effort": translated("`reasoning_effort`"),
    "reasoning.summary": ignored("the response has the thoughts themselves"),
    "reasoning.generate_summary": ignored("the response has the thoughts themselves"),
    "reasoning.context": ignored("the chat template determines which thoughts it renders"),
    "reasoning.mode": refused("it runs at a provider"),
    "text": translated("by its fields"),
    "text.format": translated("`response_format`"),
    "text.verbosity": translated("`verbosity`"),
    "tool_choice": translated("`tool_choice`: a word, a function or a custom tool"),
    "tools": translated("`tools`"),
    "tools[]: function": translated("`function` with its name, description, parameters and `strict`"),
    "tools[]: custom": translated("`function` with the text as its argument `input`"),
    "custom.name": translated("`function.name`"),
    "custom.description": translated("`function.description`"),
    "custom.format": translated("nothing, for a text; engines follow no grammar, which is refused"),
    "function.name": translated("`function.name`"),
    "function.description": translated("`function.description`"),
    "function.parameters": translated("`function.parameters`"),
    "function.strict": translated("`function.strict`"),
    "function.defer_loading": refused("the tool search runs at a provider"),
    "function.allowed_callers": refused("only the model calls tools"),
    "metadata": ignored("the response and the recorded request have it"),
    "context_management": ignored("engines refuse an input that is too long"),
    "truncation": ignored("engines refuse an input that is too long"),
    "max_tool_calls": ignored("it limits tools that run at a provider"),
    "store": ignored("responses are never stored"),
    "access_programs": _ACCOUNT,
    "background_options": ignored("it is about `background`"),
    "prompt_cache_key": _ACCOUNT,
    "prompt_cache_options": _ACCOUNT,
    "prompt_cache_retention": _ACCOUNT,
    "safety_identifier": _ACCOUNT,
    "service_tier": _ACCOUNT,
    "background": _STATE,
    "conversation": _STATE,
    "previous_response_id": _STATE,
    "prompt": _STATE,
    "image": ignored("engines get images as they are"),
    "moderation": refused("engines do not moderate"),
    **ITEM_FIELDS,
}
_INCOMPLETE: Final = {"length": "max_output_tokens", "content_filter": "content_filter"}
_LOGPROBS: Final = "message.output_text.logprobs"
_ECHOED: Final = {
    "instructions": None,
    "max_output_tokens": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "temperature": None,
    "tool_choice": "auto",
    "tools": [],
    "top_p": None,
    "text": {"format": {"type": "text"}},
    "truncation": "disabled",
}
"""Fields of the request that a response repeats, with their defaults."""


class Responses(Translated):
    api = "/v1/responses"
    fields = _FIELDS

    def __init__(self, body: Json, model: str | None) -> None:
        super().__init__(body, model)
        self.whole_calls = {tool["name"] for tool in body.get("tools") or () if tool["type"] == "custom"}
        self._created = int(time.time())
        self._events = 0
        self._items: list[Json] = []
        """Output items that have arrived."""
        self._open: str | int = ""
        """The open item: `message`, `reasoning`, or the index of a tool call; empty: the last item is complete."""
        self._pieces: list[str] = []
        """The text of the open item so far."""

    def translate(self, body: Json) -> Json:
        request = passed_on(body, _FIELDS)
        content = body["input"]
        items = [{"role": "user", "content": content}] if isinstance(content, str) else content
        system = [{"role": "system", "content": body["instructions"]}] if body.get("instructions") else []
        request |= {"messages": system + list(to_messages(items))}
        if body.get("max_output_tokens") is not None:
            request["max_tokens"] = body["max_output_tokens"]
        if body.get("tools"):
            request["tools"] = [_tool(tool) for tool in body["tools"]]
        if body.get("tool_choice") is not None:
            request["tool_choice"] = _tool_choice(body["tool_choice"])
        if _LOGPROBS in (body.get("include") or ()):
            request |= {"logprobs": True, "top_logprobs": body.get("top_logprobs") or 0}
        return request | _style(body)

    # --- The response, whole ------------------------------------------------------------------------------------------

    def render_message(self, response: Json) -> bytes:
        choice = self.choice
        if choice.reasoning:
            self._items.append(self._reasoning(choice.reasoning))
        if choice.text:
            self._items.append(self._message(choice.text, _logprobs(response["choices"][0])))
        for number, call in enumerate(choice.tool_calls):
            self._items.append(self._call(number, call, call.arguments))
        return json.dumps(self._response(self._status())).encode()

    def _status(self) -> str:
        return "incomplete" if self.choice.finish_reason in _INCOMPLETE else "completed"

    def _response(self, status: str) -> Json:
        prompt, answer = self.token_counts()
        usage = {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": self.token_detail("prompt_tokens_details", "cached_tokens")},
            "output_tokens": answer,
            "output_tokens_details": {
                "reasoning_tokens": self.token_detail("completion_tokens_details", "reasoning_tokens")
            },
            "total_tokens": prompt + answer,
        }
        incomplete = status == "incomplete"
        echoed = _ECHOED | {name: value for name, value in self.body.items() if name in _ECHOED and value is not None}
        return echoed | {
            "id": self.capture.response_id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": _INCOMPLETE[self.choice.finish_reason or ""]} if incomplete else None,
            "model": self.body.get("model"),
            "output": self._items,
            "previous_response_id": None,
            "reasoning": self.body.get("reasoning") or {"effort": None, "summary": None},
            "store": False,
            "usage": None if status == "in_progress" else usage,
        }

    def _id(self, kind: str) -> str:
        return f"{kind}_{self.capture.response_id}_{len(self._items)}"

    def _message(self, text: str, logprobs: list[Json], status: str = "completed") -> Json:
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": self._requested_logprobs(logprobs)}
        message = {"id": self._id("msg"), "type": "message", "role": "assistant", "status": status}
        return message | {"content": [part] if status == "completed" else []}

    def _reasoning(self, text: str) -> Json:
        content = [{"type": "reasoning_text", "text": text}]
        return {"id": self._id("rs"), "type": "reasoning", "summary": [], "content": content}

    def _call(self, number: int, call: CapturedToolCall, arguments: str, status: str = "completed") -> Json:
        called = {"call_id": self.call_id(number, call), "name": call.name, "status": status}
        if call.name in self.whole_calls:
            return called | {"id": self._id("ctc"), "type": "custom_tool_call", "input": _custom_input(arguments)}
        return called | {"id": self._id("fc"), "type": "function_call", "arguments": arguments}

    def _requested_logprobs(self, logprobs: list[Json]) -> list[Json]:
        return logprobs if _LOGPROBS in (self.body.get("include") or ()) else []

    # --- The response, streamed ---------------------------------------------------------------------------------------

    def render_text(self, choice: Json, text: str, thoughts: str) -> bytes:
        events = self._begin()
        if thoughts:
            events += self._open_item("reasoning", lambda: self._reasoning(""))
            events += self._append("reasoning_text", thoughts, content_index=0)
        if text:
            events += self._open_item("message", lambda: self._message("", [], "in_progress"))
            if not (message := self._items[-1])["content"]:
                message["content"].append({"type": "output_text", "text": "", "annotations": [], "logprobs": []})
                part = message["content"][0] | {"text": ""}
                events += self._event("response.content_part.added", {"content_index": 0, "part": part})
            logprobs = self._requested_logprobs(_logprobs(choice))
            message["content"][0]["logprobs"] += logprobs
            events += self._append("output_text", text, content_index=0, logprobs=logprobs)
        return events

    def render_call(self, number: int, call: CapturedToolCall, piece: str) -> bytes:
        events = self._begin() + self._open_item(number, lambda: self._call(number, call, "", "in_progress"))
        if call.name in self.whole_calls:
            return events + self._append("custom_tool_call_input", _custom_input(piece))
        return events + (self._append("function_call_arguments", piece) if piece else b"")

    def render_end(self, done: bytes) -> bytes:
        status = self._status()
        events = self._begin() + self.render_rest() + self._close_item()
        return events + self._event(f"response.{status}", {"response": self._response(status)}, False)

    def _begin(self) -> bytes:
        """The events that start the response, unless it has started."""
        if self._events:
            return b""
        names = ("response.created", "response.in_progress")
        return b"".join(self._event(name, {"response": self._response("in_progress")}, False) for name in names)

    def _open_item(self, kind: str | int, make: Any) -> bytes:
        """The events that start an item, unless it is open."""
        if kind == self._open:
            return b""
        closed = self._close_item()
        self._open = kind
        item = make()
        self._items.append(item)
        return closed + self._event("response.output_item.added", {"item": item})

    def _close_item(self) -> bytes:
        if self._open == "":
            return b""
        item, events, text = self._items[-1], b"", "".join(self._pieces)
        self._pieces = []
        if item["type"] == "message":
            item["content"][0]["text"] = text
            part, place = item["content"][0], {"content_index": 0}
            done = place | {"text": part["text"], "logprobs": part["logprobs"]}
            events += self._event("response.output_text.done", done)
            events += self._event("response.content_part.done", place | {"part": part})
        elif item["type"] == "function_call":
            item["arguments"] = text
            events += self._event("response.function_call_arguments.done", {"arguments": text, "name": item["name"]})
        elif item["type"] == "custom_tool_call":
            item["input"] = text
            events += self._event("response.custom_tool_call_input.done", {"input": text})
        else:
            item["content"][0]["text"] = text
            events += self._event("response.reasoning_text.done", {"content_index": 0, "text": text})
        if "status" in item:
            item["status"] = "completed"
        events += self._event("response.output_item.done", {"item": item}, False, output_index=len(self._items) - 1)
        self._open = ""
        return events

    def _append(self, kind: str, piece: str, **more: Any) -> bytes:
        self._pieces.append(piece)
        return self._event(f"response.{kind}.delta", {"delta": piece, **more})

    def _event(self, name: str, data: Json, of_item: bool = True, **more: Any) -> bytes:
        place = {"output_index": len(self._items) - 1} if of_item else {}
        if of_item and "item" not in data:
            place["item_id"] = self._items[-1]["id"]
        event = {"type": name, "sequence_number": self._events} | place | more | data
        self._events += 1
        return to_event(event, name)

    # --- Errors -------------------------------------------------------------------------------------------------------

    @classmethod
    def error_body(cls, error: ApiError) -> Json:
        return error.body()

    def render_error(self, error: ApiError) -> bytes:
        return self._event("error", {"code": error.code, "message": str(error), "param": None}, False)


def _tool(tool: Json) -> Json:
    kind = check_type(tool, "tools[]", _FIELDS)
    check_object(tool, kind, _FIELDS)
    if kind == "function":
        return function_tool(tool["name"], tool.get("description"), tool.get("parameters"), tool.get("strict"))
    if (form := (tool.get("format") or {}).get("type", "text")) != "text":
        raise ValueError(f"the custom tool {tool['name']!r} has the format {form}, which engines do not follow")
    schema = {"type": "object", "properties": {CUSTOM_INPUT: {"type": "string"}}, "required": [CUSTOM_INPUT]}
    return function_tool(tool["name"], tool.get("description"), schema)


def _tool_choice(choice: Any) -> Any:
    if isinstance(choice, str):
        return choice
    if choice["type"] not in ("function", "custom"):
        raise ValueError(f"engines know no tool_choice of type {choice['type']}")
    return {"type": "function", "function": {"name": choice["name"]}}


def _custom_input(arguments: str) -> str:
    """The text in the arguments of a function that stands for a custom tool; else what the model wrote."""
    try:
        given = json.loads(arguments)[CUSTOM_INPUT]
    except (ValueError, TypeError, KeyError, RecursionError):
        return arguments
    return given if isinstance(given, str) else arguments


def _style(body: Json) -> Json:
    """The fields for `reasoning` and `text`."""
    reasoning = check_object(body.get("reasoning") or {}, "reasoning", _FIELDS)
    text = check_object(body.get("text") or {}, "text", _FIELDS)
    chosen = {"reasoning_effort": reasoning.get("effort"), "verbosity": text.get("verbosity")}
    return {name: value for name, value in chosen.items() if value} | _response_format(text.get("format") or {})


def _response_format(requested: Json) -> Json:
    kind = requested.get("type", "text")
    if kind == "text":
        return {}
    if kind == "json_schema":
        schema = {name: value for name, value in requested.items() if name != "type"}
        return {"response_format": {"type": kind, "json_schema": schema}}
    return {"response_format": {"type": kind}}


def _logprobs(choice: Json) -> list[Json]:
    return (choice.get("logprobs") or {}).get("content") or []
