"""OpenAI's Responses API (`/v1/responses`), translated to chat completions; no state is kept between calls."""

import json
import time
from typing import Any, Final

from agl.gateway.dialect.dialect import to_event
from agl.gateway.dialect.input_items import to_messages
from agl.gateway.dialect.translated import Translated, function_tool
from agl.server.api_error import ApiError
from agl.tokens.capture import Json

_NOT_COPIED: Final = frozenset(
    {"model", "input", "instructions", "max_output_tokens", "tools", "tool_choice", "text", "reasoning", "include"}
    | {"stream", "stream_options", "store", "metadata", "truncation", "background", "previous_response_id", "prompt"}
    | {"conversation", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "top_logprobs"}
    | {"max_tool_calls", "service_tier"}
)
"""Fields that are translated, or that engines do not know; all others are copied."""
_STATEFUL: Final = ("previous_response_id", "conversation", "prompt", "background")
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

    def __init__(self, body: Json, model: str | None) -> None:
        super().__init__(body, model)
        self._created = int(time.time())
        self._events = 0
        self._items: list[Json] = []
        """Output items that have arrived."""
        self._open: str | int = ""
        """The open item: `message`, `reasoning`, or the index of a tool call; empty: the last item is complete."""

    def translate(self, body: Json) -> Json:
        for name in _STATEFUL:
            if body.get(name):
                raise ValueError(
                    f"the gateway keeps no state between calls, which {name} needs; send the whole input instead"
                )
        content = body["input"]
        items = [{"role": "user", "content": content}] if isinstance(content, str) else content
        system = [{"role": "system", "content": body["instructions"]}] if body.get("instructions") else []
        request = {name: value for name, value in body.items() if name not in _NOT_COPIED}
        request |= {"messages": system + list(to_messages(items))}
        if body.get("max_output_tokens") is not None:
            request["max_tokens"] = body["max_output_tokens"]
        if body.get("tools"):
            request["tools"] = [self._tool(tool) for tool in body["tools"]]
        if body.get("tool_choice") is not None:
            request["tool_choice"] = _tool_choice(body["tool_choice"])
        if _LOGPROBS in (body.get("include") or ()):
            request |= {"logprobs": True, "top_logprobs": body.get("top_logprobs") or 0}
        if effort := (body.get("reasoning") or {}).get("effort"):
            request["reasoning_effort"] = effort
        return request | _response_format((body.get("text") or {}).get("format") or {})

    def _tool(self, tool: Json) -> Json:
        if tool["type"] != "function":
            raise ValueError(f"a tool of type {tool['type']} runs at a provider; offer a function")
        return function_tool(tool["name"], tool.get("description"), tool.get("parameters"), tool.get("strict"))

    # --- The response, whole ------------------------------------------------------------------------------------------

    def render_whole(self, raw: bytes, response: Json) -> bytes:
        choice = self.choice
        if choice.reasoning:
            self._items.append(self._reasoning(choice.reasoning))
        if choice.text:
            self._items.append(self._message(choice.text, _logprobs(response["choices"][0])))
        self._items += [self._call(call.id, call.name, call.arguments) for call in choice.tool_calls]
        return json.dumps(self._response(self._status())).encode()

    def _status(self) -> str:
        return "incomplete" if self.choice.finish_reason in _INCOMPLETE else "completed"

    def _response(self, status: str) -> Json:
        prompt, answer = self.token_counts()
        usage = {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": answer,
            "output_tokens_details": {"reasoning_tokens": 0},
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

    def _call(self, call_id: str, name: str, arguments: str, status: str = "completed") -> Json:
        called = {"type": "function_call", "call_id": call_id, "name": name, "arguments": arguments}
        return {"id": self._id("fc"), "status": status} | called

    def _requested_logprobs(self, logprobs: list[Json]) -> list[Json]:
        return logprobs if _LOGPROBS in (self.body.get("include") or ()) else []

    # --- The response, streamed ---------------------------------------------------------------------------------------

    def render_delta(self, choice: Json, delta: Json) -> bytes:
        events = b"" if self._events else self._begin()
        if thought := delta.get("reasoning_content") or delta.get("reasoning"):
            events += self._open_item("reasoning", lambda: self._reasoning(""))
            events += self._append("reasoning_text", self._items[-1]["content"][0], "text", thought)
        if text := delta.get("content"):
            events += self._open_item("message", lambda: self._message("", [], "in_progress"))
            if not (message := self._items[-1])["content"]:
                message["content"].append({"type": "output_text", "text": "", "annotations": [], "logprobs": []})
                part = message["content"][0] | {"text": ""}
                events += self._event("response.content_part.added", {"content_index": 0, "part": part})
            logprobs = self._requested_logprobs(_logprobs(choice))
            message["content"][0]["logprobs"] += logprobs
            events += self._append("output_text", message["content"][0], "text", text, logprobs=logprobs)
        for call in delta.get("tool_calls") or ():
            events += self._add_to_call(call)
        return events

    def _add_to_call(self, call: Json) -> bytes:
        function = call.get("function") or {}
        name, arguments = function.get("name") or "", function.get("arguments")
        call_id = call.get("id") or ""
        events = self._open_item(call.get("index", 0), lambda: self._call(call_id, name, "", "in_progress"))
        if arguments:
            events += self._append("function_call_arguments", self._items[-1], "arguments", arguments)
        return events

    def render_end(self, done: bytes) -> bytes:
        status = self._status()
        events = b"" if self._events else self._begin()
        events += self._close_item()
        return events + self._event(f"response.{status}", {"response": self._response(status)}, False)

    def _begin(self) -> bytes:
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
        item, events = self._items[-1], b""
        if item["type"] == "message":
            part, place = item["content"][0], {"content_index": 0}
            done = place | {"text": part["text"], "logprobs": part["logprobs"]}
            events += self._event("response.output_text.done", done)
            events += self._event("response.content_part.done", place | {"part": part})
        elif item["type"] == "function_call":
            call = {"arguments": item["arguments"], "name": item["name"]}
            events += self._event("response.function_call_arguments.done", call)
        else:
            text = item["content"][0]["text"]
            events += self._event("response.reasoning_text.done", {"content_index": 0, "text": text})
        if "status" in item:
            item["status"] = "completed"
        events += self._event("response.output_item.done", {"item": item}, False, output_index=len(self._items) - 1)
        self._open = ""
        return events

    def _append(self, kind: str, holder: Json, field: str, piece: str, **more: Any) -> bytes:
        holder[field] += piece
        place = {} if kind == "function_call_arguments" else {"content_index": 0}
        return self._event(f"response.{kind}.delta", {"delta": piece, **place, **more})

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


def _tool_choice(choice: Any) -> Any:
    if isinstance(choice, str):
        return choice
    if choice["type"] != "function":
        raise ValueError(f"engines know no tool_choice of type {choice['type']}")
    return {"type": "function", "function": {"name": choice["name"]}}


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
