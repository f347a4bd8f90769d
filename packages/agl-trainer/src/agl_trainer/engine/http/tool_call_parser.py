"""Parses the tool calls in sampled text, whole or streamed; `data.tool_call` defines the format.

Arguments keep the model's text, so that the chat template renders a returned conversation to the sampled tokens.
"""

import json
import re
from typing import Any

from agl_trainer.data.tool_call import OPEN, ToolCall
from agl_trainer.engine.http.detokenizer import overlap

_LEAD = re.compile(r"\s*(?:```(?:json)?\s*)?")
_TRAIL = re.compile(r"[\s}\]`]*(?:</tool_call>|\Z)")
_ARGUMENTS = re.compile(r'"(?:arguments|parameters)"\s*:\s*')
_JSON = json.JSONDecoder(strict=False)


def parse(text: str) -> tuple[str, list[ToolCall]]:
    """Content and tool calls of an answer. The content keeps malformed blocks, but not the blanks around calls."""
    outside: list[str] = []
    calls: list[ToolCall] = []
    begin = position = 0
    while (start := text.find(OPEN, position)) >= 0:
        position = start + len(OPEN)
        block = _read_block(text, position)
        if block is not None:
            outside.append(text[begin:start])
            begin = position = block[1]
            calls += block[0]
    if not calls:
        return text, []
    outside.append(text[begin:])
    return "".join(piece for piece in outside if piece.strip()), calls


class ToolCallParser:
    """Splits a streamed answer: content is passed on at once, text that may be a tool call is withheld.

    `start` is the part of the answer that the prompt ends with (see `forced_start`).
    """

    def __init__(self, start: str = "") -> None:
        self._withheld = start
        self._has_content = False

    def feed(self, piece: str) -> str:
        """Content that cannot be part of a tool call."""
        self._withheld += piece
        start = self._withheld.find(OPEN)
        cut = start if start >= 0 else len(self._withheld) - overlap(self._withheld, [OPEN])
        content = self._withheld[:cut]
        if not self._has_content and not content.strip():
            return ""
        self._has_content = True
        self._withheld = self._withheld[cut:]
        return content

    def finish(self) -> tuple[str, list[ToolCall]]:
        """The rest of the content, and the tool calls."""
        return parse(self._withheld)


def _read_block(text: str, position: int) -> tuple[list[ToolCall], int] | None:
    """Calls of the block whose content starts at `position`, and the end of the block; None if it is malformed."""
    lead = _LEAD.match(text, position)
    begin = lead.end() if lead else position
    try:
        value, end = _JSON.raw_decode(text, begin)
    except (ValueError, RecursionError):
        return None
    trail = _TRAIL.match(text, end)
    items = value if isinstance(value, list) else [value]
    calls = [_read_call(item, text[begin:end] if item is value else "") for item in items]
    if trail is None or not calls or None in calls:
        return None
    return [call for call in calls if call is not None], trail.end()


def _read_call(value: Any, written: str) -> ToolCall | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        return ToolCall(value["name"], arguments) if _is_object(arguments) else None
    if not isinstance(arguments, dict):
        return None
    return ToolCall(value["name"], _as_written(arguments, written) or json.dumps(arguments, ensure_ascii=False))


def _as_written(arguments: dict[str, Any], written: str) -> str | None:
    """The text of `arguments` in `written`, if it is there and is JSON that strict parsers accept."""
    match = _ARGUMENTS.search(written)
    if match is None:
        return None
    value, end = _JSON.raw_decode(written, match.end())
    text = written[match.end() : end]
    return text if value == arguments and _is_object(text) else None


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
