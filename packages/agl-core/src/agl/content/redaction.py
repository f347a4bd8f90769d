"""Redaction: a function of the user's is applied to every text in a span's attributes before they are recorded."""

import json
import logging
import traceback
from collections.abc import Callable
from typing import Any

from opentelemetry.util.types import AttributeValue

from agl import semconv

Redact = Callable[[str], str]
"""Takes a text and returns the text that may leave the process."""

_STRUCTURE = {"type", "role", "id", "name", "finish_reason", "modality", "mime_type"}
"""Fields of messages and parts that describe structure, not content."""
_CONVENTIONS = ("agl.", "gen_ai.", "error.")
"""Attributes with these prefixes are ids, roles, names and numbers, unless `_REDACTORS` lists them."""

logger = logging.getLogger("agl")


def redact_attribute(name: str, value: AttributeValue, redact: Redact) -> AttributeValue | None:
    """`value` of the attribute `name` after redaction; None if redaction failed, which is logged."""
    if name not in _REDACTORS and name.startswith(_CONVENTIONS):
        return value
    try:
        return _REDACTORS.get(name, _texts)(value, redact)
    except Exception as error:  # noqa: BLE001 - the user's function; its message may quote the text, so it is not logged
        where = "".join(traceback.format_tb(error.__traceback__))
        logger.error("%s is left out: it cannot be redacted (%s)\n%s", name, type(error).__qualname__, where)
        return None


def _texts(value: Any, redact: Redact) -> Any:
    """A string or a list of strings; values of other types are not content."""
    if isinstance(value, str):
        return _text(value, redact)
    return [_texts(item, redact) for item in value] if isinstance(value, list | tuple) else value


def _text(text: str, redact: Redact) -> str:
    redacted = redact(text)
    if not isinstance(redacted, str):
        raise TypeError
    return redacted


def map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with `change` applied to every string except the keys of objects."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [map_texts(item, change) for item in value]
    if isinstance(value, dict):
        return {key: map_texts(item, change) for key, item in value.items()}
    return value


def _leaves(value: Any, redact: Redact) -> Any:
    return map_texts(value, lambda text: _text(text, redact))


def _parts(parts: Any, redact: Redact) -> Any:
    """Parts of a message, or retrieved documents: fields of structure stay, the others are redacted."""
    return [{key: _field(key, item, redact) for key, item in part.items()} for part in parts]


def _messages(messages: Any, redact: Redact) -> Any:
    return [
        {key: _parts(item, redact) if key == "parts" else _field(key, item, redact) for key, item in message.items()}
        for message in messages
    ]


def _field(key: str, item: Any, redact: Redact) -> Any:
    return item if key in _STRUCTURE else _leaves(item, redact)


def _descriptions(value: Any, redact: Redact) -> Any:
    """A tool definition with its descriptions redacted; the rest of a JSON schema is names and types."""
    if isinstance(value, list):
        return [_descriptions(item, redact) for item in value]
    if isinstance(value, dict):
        return {
            key: _text(item, redact) if key == "description" and isinstance(item, str) else _descriptions(item, redact)
            for key, item in value.items()
        }
    return value


def _json(walk: Callable[[Any, Redact], Any]) -> Callable[[str, Redact], str]:
    """`walk`, applied to JSON text."""
    return lambda text, redact: json.dumps(walk(json.loads(text), redact), ensure_ascii=False, separators=(",", ":"))


def _text_or_json(text: str, redact: Redact) -> str:
    """JSON if the text is an object or an array, plain text otherwise."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    return _json(_leaves)(text, redact) if isinstance(value, dict | list) else _text(text, redact)


_REDACTORS: dict[str, Callable[[Any, Redact], Any]] = {
    semconv.GEN_AI_INPUT_MESSAGES: _json(_messages),
    semconv.GEN_AI_OUTPUT_MESSAGES: _json(_messages),
    semconv.GEN_AI_SYSTEM_INSTRUCTIONS: _json(_parts),
    semconv.GEN_AI_TOOL_DEFINITIONS: _json(_descriptions),
    semconv.GEN_AI_TOOL_DESCRIPTION: _text,
    semconv.GEN_AI_TOOL_CALL_ARGUMENTS: _json(_leaves),
    semconv.GEN_AI_TOOL_CALL_RESULT: _json(_leaves),
    semconv.GEN_AI_RETRIEVAL_QUERY_TEXT: _text,
    semconv.GEN_AI_RETRIEVAL_DOCUMENTS: _json(_parts),
    semconv.MESSAGE_BODY: _text,
    semconv.OBSERVATION_CONTENT: _text_or_json,
    semconv.OBJECT_JSON: _json(_leaves),
    semconv.OPERATION_INPUT: _json(_leaves),
    semconv.OPERATION_OUTPUT: _json(_leaves),
}
"""The redactor of each attribute that holds content."""
