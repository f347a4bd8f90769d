"""What was said in a model call: messages, tools and answer as in OpenAI's chat API, whichever span recorded them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agl import semconv
from agl.span import Span
from agl.trajectory import Call
from agl.trajectory.attributes import read_object

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Conversation:
    """The content of a call, as far as it is recorded."""

    messages: list[Message]
    tools: list[dict[str, Any]]
    answer: Message | None

    @property
    def completion(self) -> str | Message | None:
        """The answer as an SFT example has it: text or, with tool calls, the message."""
        if self.answer is None or self.answer.get("tool_calls"):
            return self.answer
        return self.answer["content"]


def read_conversation(call: Call, spans: Mapping[str, Span]) -> Conversation:
    """The content of `call` on its spans, of which `spans` has all by id; the gateway's span comes first."""
    own = [spans[name] for name in dict.fromkeys((call.span_id, call.chat_span_id or call.span_id)) if name in spans]
    request: dict[str, Any] = {}
    for span in own:
        # A translated request has the messages of both APIs: the engine's are OpenAI's.
        request |= read_object(span, semconv.GATEWAY_REQUEST) | read_object(span, semconv.GATEWAY_CHANGED)
    answers = next((found for span in own if (found := _messages(span, semconv.GEN_AI_OUTPUT_MESSAGES))), [])
    return Conversation(
        _requested(request) or next((found for span in own if (found := _input(span))), []),
        [*map(_tool, _dicts(request.get("tools")))] or next((found for span in own if (found := _tools(span))), []),
        answers[min(call.choice, len(answers) - 1)] if answers else None,
    )


def text_of(message: Message) -> str:
    """The message as text: its content, its tool calls as `name(arguments)`; what is no text by its type."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [content] if content else []
    lines = [f"(thinks) {message['reasoning_content']}"] if message.get("reasoning_content") else []
    lines += [part if isinstance(part, str) else _block_text(part) for part in parts]
    for call in _dicts(message.get("tool_calls")):
        function = call.get("function") or {}
        lines.append(f"{function.get('name')}({function.get('arguments')})")
    return "\n".join(lines)


def _load(text: str | None) -> Any:
    """The JSON value of `text`; None if it is none."""
    try:
        return json.loads(text) if text else None
    except (ValueError, RecursionError):
        return None


def _requested(body: Mapping[str, Any]) -> list[Message]:
    """The messages of a request, or the prompt of a request without messages."""
    if messages := _dicts(body.get("messages")):
        return messages
    prompt = body.get("prompt", body.get("input"))
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else []


def _input(span: Span) -> list[Message]:
    instructions = _dicts(_load(span.text(semconv.GEN_AI_SYSTEM_INSTRUCTIONS)))
    system = [_message("system", instructions)] if instructions else []
    return system + _messages(span, semconv.GEN_AI_INPUT_MESSAGES)


def _messages(span: Span, name: str) -> list[Message]:
    """Messages of the GenAI conventions; of one with several tool results, a message for each."""
    return [made for message in _dicts(_load(span.text(name))) for made in _converted(message)]


def _converted(message: Mapping[str, Any]) -> Iterator[Message]:
    role, parts = str(message.get("role") or "user"), _dicts(message.get("parts"))
    results = [part for part in parts if part.get("type") == "tool_call_response"]
    for part in results:
        result = part.get("response", part.get("result"))
        yield {"role": "tool", "tool_call_id": str(part.get("id")), "content": _as_text(result)}
    if not results:
        yield _message(role, parts)


def _message(role: str, parts: Sequence[Mapping[str, Any]]) -> Message:
    of_type: dict[str, list[Any]] = {}
    for part in parts:
        of_type.setdefault(str(part.get("type")), []).append(part)
    reasoning = "\n".join(_as_text(part.get("content")) for part in of_type.pop("reasoning", []))
    calls = [_tool_call(part) for part in of_type.pop("tool_call", [])]
    texts = [part.get("content") for part in of_type.get("text", [])]
    only_text = of_type.keys() <= {"text"} and all(isinstance(text, str) for text in texts)
    content = "\n".join(texts) if only_text else [part for group in of_type.values() for part in group]
    extra = {"reasoning_content": reasoning, "tool_calls": calls}
    return {"role": role, "content": content} | {name: value for name, value in extra.items() if value}


def _tool_call(part: Mapping[str, Any]) -> dict[str, Any]:
    function = {"name": str(part.get("name")), "arguments": _as_text(part.get("arguments"))}
    return {"id": str(part.get("id")), "type": "function", "function": function}


def _tools(span: Span) -> list[dict[str, Any]]:
    return [*map(_tool, _dicts(_load(span.text(semconv.GEN_AI_TOOL_DEFINITIONS))))]


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's form of a tool; the GenAI conventions have the function's fields beside the type."""
    if "function" in tool or tool.get("type", "function") != "function":
        return tool
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _block_text(block: Any) -> str:
    text = block.get("text", block.get("content")) if isinstance(block, dict) else None
    return text if isinstance(text, str) else f"[{block.get('type') if isinstance(block, dict) else block}]"


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
