"""Anthropic's Messages API (`/v1/messages`), translated to chat completions."""

import json
from collections.abc import Iterator
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
from agl.gateway.dialect.translated import Translated, function_tool, text_of, tool_call
from agl.server.api_error import ApiError
from agl.tokens.capture import CapturedToolCall, Choice, Json

_PROVIDER: Final = refused("it runs at a provider")
_ACCOUNT: Final = ignored("it is about the provider's account, capacity or cache")
_CACHE: Final = ignored("engines cache every prefix")
_FIELDS: Final[Fields] = {
    "model": translated("`model`, by `gateway.models`"),
    "messages": translated("`messages`"),
    "system": translated("the first message"),
    "max_tokens": PASSED_ON,
    "stop_sequences": translated("`stop`"),
    "temperature": PASSED_ON,
    "top_p": PASSED_ON,
    "top_k": PASSED_ON,
    "stream": translated("`stream`, and `stream_options.include_usage`"),
    "thinking": translated("whether the response shows thoughts; engines have no budget for them"),
    "tool_choice": translated("`tool_choice` and `parallel_tool_calls`"),
    "tools": translated("`tools`"),
    "tools[].name": translated("`function.name`"),
    "tools[].description": translated("`function.description`"),
    "tools[].input_schema": translated("`function.parameters`"),
    "tools[].strict": translated("`function.strict`"),
    "tools[].cache_control": _CACHE,
    "tools[].eager_input_streaming": ignored("arguments are streamed always"),
    "tools[].defer_loading": refused("the tool search runs at a provider"),
    "tools[].allowed_callers": refused("only the model calls tools"),
    "tools[].input_examples": refused("put examples into the description"),
    "output_config": translated("by its fields"),
    "output_config.format": translated("`response_format`"),
    "output_config.effort": translated("`reasoning_effort`"),
    "output_config.task_budget": refused("engines have no budget for a task"),
    "content[]: text": translated("text, without citations"),
    "content[]: image": translated("`image_url`"),
    "content[]: thinking": translated("`reasoning_content`"),
    "content[]: tool_use": translated("`tool_calls`"),
    "content[]: tool_result": translated("a message of the role `tool`; `is_error` is left out"),
    "content[]: document": refused("engines read no documents; send text or images"),
    "content[]: search_result": refused("engines cite no sources; send text"),
    "content[]: redacted_thinking": refused("engines cannot read it"),
    "content[]: compaction": refused("engines cannot read it"),
    "source: base64": translated("a data URL"),
    "source: url": translated("the URL"),
    "source: file": refused("the gateway keeps no files"),
    "metadata": ignored("the recorded request has it"),
    "cache_control": _CACHE,
    "context_management": ignored("it edits the history that a provider keeps; some clients always send it"),
    "diagnostics": _ACCOUNT,
    "billing_policy": _ACCOUNT,
    "fallback_credit_token": _ACCOUNT,
    "inference_geo": _ACCOUNT,
    "service_tier": _ACCOUNT,
    "speed": _ACCOUNT,
    "user_profile_id": _ACCOUNT,
    "workspace_id": _ACCOUNT,
    "compaction": _PROVIDER,
    "container": _PROVIDER,
    "fallbacks": refused("one model answers a call"),
    "mcp_servers": _PROVIDER,
    "thread": refused("the gateway keeps no state between calls"),
}
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
    fields = _FIELDS

    def __init__(self, body: Json, model: str | None) -> None:
        super().__init__(body, model)
        self._thinks = (body.get("thinking") or {}).get("type", "disabled") != "disabled"
        self._blocks = 0
        self._open = ""
        """The open block: `text`, `thinking`, or `tool` and its index; `start`: between blocks; empty: not started."""

    def translate(self, body: Json) -> Json:
        request = passed_on(body, _FIELDS)
        system = [{"role": "system", "content": text_of(body["system"])}] if body.get("system") else []
        request |= {"messages": system + [turn for message in body["messages"] for turn in _turns(message)]}
        if body.get("stop_sequences"):
            request["stop"] = body["stop_sequences"]
        if body.get("tools"):
            request["tools"] = [_tool(tool) for tool in body["tools"]]
        return request | _tool_choice(body.get("tool_choice")) | _output(body.get("output_config") or {})

    # --- The response -------------------------------------------------------------------------------------------------

    def render_message(self, response: Json) -> bytes:
        content = list(self._content(self.choice))
        return json.dumps(self._message(content) | self._stop() | {"usage": self._usage()}).encode()

    def render_text(self, choice: Json, text: str, thoughts: str) -> bytes:
        events = self._started()
        if self._thinks and thoughts:
            events += self._block("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            events += self._delta({"type": "thinking_delta", "thinking": thoughts})
        if text:
            events += self._block("text", {"type": "text", "text": ""})
            events += self._delta({"type": "text_delta", "text": text})
        return events

    def render_call(self, number: int, call: CapturedToolCall, piece: str) -> bytes:
        start = {"type": "tool_use", "id": self.call_id(number, call), "name": call.name, "input": {}}
        events = self._block(f"tool {number}", start)
        return events + (self._delta({"type": "input_json_delta", "partial_json": piece}) if piece else b"")

    def render_end(self, done: bytes) -> bytes:
        rest = self._started() + self.render_rest()
        last = {"type": "message_delta", "delta": self._stop(), "usage": self._usage()}
        return rest + self._close() + _event(last) + _event({"type": "message_stop"})

    def _started(self) -> bytes:
        """The event that starts the message, unless it has started."""
        if self._open:
            return b""
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
        for number, call in enumerate(choice.tool_calls):
            given = {"id": self.call_id(number, call), "name": call.name, "input": _arguments(call.arguments)}
            yield {"type": "tool_use"} | given

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


def _tool(tool: Json) -> Json:
    if "input_schema" not in tool:
        raise ValueError(f"the tool {tool.get('name')!r} runs at a provider ({tool.get('type')}); offer your own")
    check_object(tool, "tools[]", _FIELDS)
    return function_tool(tool["name"], tool.get("description"), tool["input_schema"], tool.get("strict"))


def _turns(message: Json) -> Iterator[Json]:
    """The chat messages of one message: each tool result is a message of its own, before the rest."""
    role, content = message["role"], message["content"]
    if isinstance(content, str):
        yield {"role": role, "content": content}
        return
    blocks: dict[str, list[Json]] = {"tool_result": [], "tool_use": [], "thinking": []}
    parts: list[Json] = []
    for block in content:
        blocks.get(check_type(block, "content[]", _FIELDS), parts).append(block)
    for result in blocks["tool_result"]:
        content = _content(result.get("content") or "")
        yield {"role": "tool", "tool_call_id": result["tool_use_id"], "content": content}
    calls = [tool_call(use["id"], use["name"], json.dumps(use["input"])) for use in blocks["tool_use"]]
    thoughts = "".join(block["thinking"] for block in blocks["thinking"])
    if parts or calls or thoughts:
        turn: Json = {"role": role, "content": _content(parts) or (None if calls else "")}
        turn |= {"tool_calls": calls} if calls else {}
        yield turn | ({"reasoning_content": thoughts} if thoughts else {})


def _content(content: Any) -> Any:
    """Content of a chat message: text as a string, with images as parts."""
    if isinstance(content, str):
        return content
    parts = [_part(check_type(block, "content[]", _FIELDS), block) for block in content]
    return text_of(parts) if all(part["type"] == "text" for part in parts) else parts


def _part(kind: str, block: Json) -> Json:
    if kind == "text":
        return {"type": "text", "text": block["text"]}
    if kind != "image":
        raise ValueError(f"content of type {kind} is not allowed here")
    source = block["source"]
    is_url = check_type(source, "source", _FIELDS) == "url"
    url = source["url"] if is_url else f"data:{source['media_type']};base64,{source['data']}"
    return {"type": "image_url", "image_url": {"url": url}}


def _tool_choice(choice: Json | None) -> Json:
    if not choice:
        return {}
    named = {"type": "function", "function": {"name": choice.get("name")}}
    chosen: Json = {"tool_choice": named if choice["type"] == "tool" else _TOOL_CHOICES[choice["type"]]}
    return chosen | ({"parallel_tool_calls": False} if choice.get("disable_parallel_tool_use") else {})


def _output(config: Json) -> Json:
    """The fields for `output_config`."""
    check_object(config, "output_config", _FIELDS)
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
    except (ValueError, RecursionError):
        return {"arguments": text}
    return value if isinstance(value, dict) else {"arguments": value}
