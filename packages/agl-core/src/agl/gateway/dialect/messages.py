"""Anthropic's Messages API (`/v1/messages`), translated to chat completions."""

import json
from collections.abc import Iterator
from typing import Any, Final

from agl.gateway.dialect.dialect import to_event
from agl.gateway.dialect.translated import Translated, function_tool, text_of, tool_call
from agl.server.api_error import ApiError
from agl.tokens.capture import Choice, Json

_NOT_COPIED: Final = frozenset(
    {"model", "messages", "system", "stop_sequences", "tools", "tool_choice", "thinking", "metadata", "stream"}
    | {"service_tier", "max_tokens", "output_config", "context_management"}
)
"""Fields that are translated, or that engines do not know; all others are copied. `context_management` only edits the
history that a provider keeps, and clients send it by themselves."""
_NOT_SUPPORTED: Final = ("mcp_servers", "container")
_PARTS: Final = frozenset({"text", "image"})
_STOP_REASONS: Final = {"stop": "end_turn", "length": "max_tokens", "content_filter": "refusal"}
_TOOL_CHOICES: Final = {"auto": "auto", "any": "required", "none": "none"}
_ERROR_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class Messages(Translated):
    api = "/v1/messages"

    def __init__(self, body: Json, model: str | None) -> None:
        super().__init__(body, model)
        self._thinks = (body.get("thinking") or {}).get("type", "disabled") != "disabled"
        self._blocks = 0
        self._open = ""
        """The open block: `text`, `thinking`, or `tool` and its index; `start`: between blocks; empty: not started."""

    def translate(self, body: Json) -> Json:
        for name in _NOT_SUPPORTED:
            if body.get(name):
                raise ValueError(f"{name} is not for engines; take it out")
        system = [{"role": "system", "content": text_of(body["system"])}] if body.get("system") else []
        turns = [turn for message in body["messages"] for turn in _turns(message)]
        request = {name: value for name, value in body.items() if name not in _NOT_COPIED}
        request |= {"messages": system + turns}
        if body.get("max_tokens") is not None:
            request["max_tokens"] = body["max_tokens"]
        if body.get("stop_sequences"):
            request["stop"] = body["stop_sequences"]
        if body.get("tools"):
            request["tools"] = [self._tool(tool) for tool in body["tools"]]
        return request | _tool_choice(body.get("tool_choice")) | _output(body.get("output_config") or {})

    def _tool(self, tool: Json) -> Json:
        if "input_schema" not in tool:
            raise ValueError(f"the tool {tool.get('name')!r} runs at a provider ({tool.get('type')}); offer your own")
        return function_tool(tool["name"], tool.get("description"), tool["input_schema"])

    # --- The response -------------------------------------------------------------------------------------------------

    def render_whole(self, raw: bytes, response: Json) -> bytes:
        content = list(self._content(self.choice))
        return json.dumps(self._message(content) | self._stop() | {"usage": self._usage()}).encode()

    def render_delta(self, choice: Json, delta: Json) -> bytes:
        events = b"" if self._blocks or self._open else self._start()
        if self._thinks and (thought := delta.get("reasoning_content") or delta.get("reasoning")):
            events += self._block("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            events += self._delta({"type": "thinking_delta", "thinking": thought})
        if text := delta.get("content"):
            events += self._block("text", {"type": "text", "text": ""})
            events += self._delta({"type": "text_delta", "text": text})
        for call in delta.get("tool_calls") or ():
            function = call.get("function") or {}
            start = {"type": "tool_use", "id": call.get("id"), "name": function.get("name"), "input": {}}
            events += self._block(f"tool {call.get('index', 0)}", start)
            if arguments := function.get("arguments"):
                events += self._delta({"type": "input_json_delta", "partial_json": arguments})
        return events

    def render_end(self, done: bytes) -> bytes:
        start = b"" if self._open else self._start()
        last = {"type": "message_delta", "delta": self._stop(), "usage": self._usage()}
        return start + self._close() + _event(last) + _event({"type": "message_stop"})

    def _start(self) -> bytes:
        self._open = "start"
        usage = self._usage() | {"output_tokens": 0}
        message = self._message([]) | {"stop_reason": None, "stop_sequence": None, "usage": usage}
        return _event({"type": "message_start", "message": message})

    def _block(self, kind: str, start: Json) -> bytes:
        """The events that start a block, unless it is open."""
        if kind == self._open:
            return b""
        closed = self._close()
        self._open = kind
        return closed + _event({"type": "content_block_start", "index": self._blocks, "content_block": start})

    def _close(self) -> bytes:
        if self._open in ("", "start"):
            return b""
        self._open = "start"
        self._blocks += 1
        return _event({"type": "content_block_stop", "index": self._blocks - 1})

    def _delta(self, delta: Json) -> bytes:
        return _event({"type": "content_block_delta", "index": self._blocks, "delta": delta})

    def _message(self, content: list[Json]) -> Json:
        head = {"id": self.capture.response_id, "type": "message", "role": "assistant"}
        return head | {"model": self.body.get("model"), "content": content}

    def _content(self, choice: Choice) -> Iterator[Json]:
        if self._thinks and choice.reasoning:
            yield {"type": "thinking", "thinking": choice.reasoning, "signature": ""}
        if choice.text:
            yield {"type": "text", "text": choice.text}
        for call in choice.tool_calls:
            yield {"type": "tool_use", "id": call.id, "name": call.name, "input": _arguments(call.arguments)}

    def _stop(self) -> Json:
        choice = self.choice
        reason = _STOP_REASONS.get(choice.finish_reason or "", "tool_use")
        if reason == "end_turn" and choice.tool_calls:  # Engines report `stop` for a call that `tool_choice` named.
            reason = "tool_use"
        elif reason == "end_turn" and choice.stop_string is not None:
            reason = "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": choice.stop_string}

    def _usage(self) -> Json:
        prompt, answer = self.token_counts()
        return {"input_tokens": prompt, "output_tokens": answer}

    # --- Errors -------------------------------------------------------------------------------------------------------

    @classmethod
    def error_body(cls, error: ApiError) -> Json:
        kind = _ERROR_TYPES.get(error.http_status, "api_error")
        return {"type": "error", "error": {"type": kind, "message": str(error), "code": error.code}}

    def render_error(self, error: ApiError) -> bytes:
        return _event(self.error_body(error))


def _event(data: Json) -> bytes:
    return to_event(data, data["type"])


def _turns(message: Json) -> Iterator[Json]:
    """The chat messages of one message: each tool result is a message of its own, before the rest."""
    role, content = message["role"], message["content"]
    if isinstance(content, str):
        yield {"role": role, "content": content}
        return
    for block in content:
        if block["type"] == "tool_result":
            yield {
                "role": "tool",
                "tool_call_id": block["tool_use_id"],
                "content": _content(block.get("content") or ""),
            }
    uses = [block for block in content if block["type"] == "tool_use"]
    calls = [tool_call(use["id"], use["name"], json.dumps(use["input"])) for use in uses]
    thoughts = "".join(block["thinking"] for block in content if block["type"] == "thinking")
    parts = [block for block in content if block["type"] not in ("tool_use", "tool_result", "thinking")]
    if parts or calls:
        turn: Json = {"role": role, "content": _content(parts) or None}
        turn |= {"tool_calls": calls} if calls else {}
        yield turn | ({"reasoning_content": thoughts} if thoughts else {})


def _content(content: Any) -> Any:
    """Content of a chat message: text as a string, with images as parts."""
    if isinstance(content, str):
        return content
    if unknown := {block["type"] for block in content} - _PARTS:
        raise ValueError(f"engines know no content of type {', '.join(sorted(unknown))}")
    parts = [_part(block) for block in content]
    return text_of(parts) if all(part["type"] == "text" for part in parts) else parts


def _part(block: Json) -> Json:
    if block["type"] == "text":
        return {"type": "text", "text": block["text"]}
    source = block["source"]
    url = source["url"] if source["type"] == "url" else f"data:{source['media_type']};base64,{source['data']}"
    return {"type": "image_url", "image_url": {"url": url}}


def _tool_choice(choice: Json | None) -> Json:
    if not choice:
        return {}
    named = {"type": "function", "function": {"name": choice.get("name")}}
    chosen: Json = {"tool_choice": named if choice["type"] == "tool" else _TOOL_CHOICES[choice["type"]]}
    return chosen | ({"parallel_tool_calls": False} if choice.get("disable_parallel_tool_use") else {})


def _output(config: Json) -> Json:
    """The fields for `output_config`."""
    if unknown := config.keys() - {"format", "effort"}:
        raise ValueError(f"engines know no output_config.{', '.join(sorted(unknown))}")
    chosen: Json = {"reasoning_effort": config["effort"]} if config.get("effort") else {}
    if wanted := config.get("format"):
        if wanted["type"] != "json_schema":
            raise ValueError(f"engines know no output_config.format of type {wanted['type']}")
        schema = {"name": "output", "schema": wanted["schema"]}
        chosen["response_format"] = {"type": "json_schema", "json_schema": schema}
    return chosen


def _arguments(text: str) -> Any:
    """Arguments as an object; anything else that a model wrote, under the key `arguments`."""
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return {"arguments": text}
    return value if isinstance(value, dict) else {"arguments": value}
