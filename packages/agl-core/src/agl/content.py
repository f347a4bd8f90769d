"""What messages, tool arguments, results and errors say: whether it goes on spans, and redacted how."""

import json
import logging
import os
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from opentelemetry.trace import Span
from opentelemetry.util.types import AttributeValue

from agl import semconv
from agl.errors import ConfigError

CAPTURE_CONTENT = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
"""Environment variable of the OpenTelemetry GenAI conventions: `true` or `false`, or which signal carries content."""

Redact = Callable[[str], str]
"""A text as it may leave the process, made from the text as it is."""

_NOT_ON_SPANS = {"false", "0", "no", "off", "no_content", "event_only"}
_STRUCTURE = {"type", "role", "id", "name", "finish_reason", "modality", "mime_type"}
"""Fields of messages and of their parts that say what something is, not what was said."""

logger = logging.getLogger("agl")


@dataclass(frozen=True, slots=True)
class Content:
    """What of the content that a plugin sees goes on its spans."""

    captured: bool = True
    redact: Redact | None = None

    @classmethod
    def of(cls, capture_content: bool | None = None, redact: Redact | None = None) -> "Content":
        """`capture_content` where it is given, else what the environment variable says.

        Without either content is captured: training reads the messages. The OpenTelemetry default is the opposite.

        `redact` is given every text in what is captured, before it is on a span: the texts of messages, every string in
        a tool's arguments and results, descriptions of tools, queries and documents, messages and stack traces of
        exceptions. Never token ids, and never what names something: ids, roles, names of tools and models, the keys of
        objects. If it raises, or returns no str, what it was asked about is left out, and logged.

        Raises ConfigError for a `redact` that cannot be called.
        """
        if redact is not None and not callable(redact):
            raise ConfigError(f"redact is {redact!r}, expected a function from str to str")
        if capture_content is None:
            capture_content = os.environ.get(CAPTURE_CONTENT, "").strip().lower() not in _NOT_ON_SPANS
        return cls(capture_content, redact)

    def put(self, span: Span, describe: Callable[[], Mapping[str, AttributeValue]]) -> None:
        """Set the attributes that `describe` makes, each without the others where one cannot be redacted.

        `describe` is asked only where its answer is wanted. Its values are JSON, except for the text of a query.
        """
        if not self.captured or not span.is_recording():
            return
        said = describe()
        if self.redact is not None:
            redacted = {name: self._redacted(name, value) for name, value in said.items()}
            said = {name: value for name, value in redacted.items() if value is not None}
        if said:
            span.set_attributes(said)

    def of_error(self, error: BaseException) -> tuple[str, dict[str, AttributeValue]]:
        """What a span says of `error`: its status message, and the attributes of its `exception` event.

        An error's message often quotes what a model or a tool was told, and a stack trace ends with it. So where
        content is not captured, both are the type alone.
        """
        kind = type(error)
        named = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        if not self.captured:
            return kind.__name__, {_EXCEPTION_TYPE: named}
        message = self._redacted(_EXCEPTION_MESSAGE, str(error))
        trace = self._redacted(_EXCEPTION_STACKTRACE, "".join(traceback.format_exception(error)))
        said = {_EXCEPTION_TYPE: named, _EXCEPTION_MESSAGE: message, _EXCEPTION_STACKTRACE: trace}
        status = kind.__name__ if message is None else f"{kind.__name__}: {message}"
        return status, {name: text for name, text in said.items() if text is not None}

    def _redacted(self, name: str, value: AttributeValue) -> AttributeValue | None:
        """`value` as it may leave the process; None where it may not."""
        if self.redact is None or not isinstance(value, str):
            return value
        try:
            return _REDACTED_JSON[name](value, self.redact) if name in _REDACTED_JSON else _text(value, self.redact)
        except Exception as error:  # noqa: BLE001 - redact is the user's; its message may quote what it was given
            where = "".join(traceback.format_tb(error.__traceback__))
            logger.error("%s is left out: it cannot be redacted (%s)\n%s", name, type(error).__qualname__, where)
            return None


_EXCEPTION_TYPE = "exception.type"
_EXCEPTION_MESSAGE = "exception.message"
_EXCEPTION_STACKTRACE = "exception.stacktrace"


def _text(text: str, redact: Redact) -> str:
    redacted = redact(text)
    if not isinstance(redacted, str):
        raise TypeError
    return redacted


def _leaves(value: Any, redact: Redact) -> Any:
    """JSON with every string redacted, except the keys of objects."""
    if isinstance(value, str):
        return _text(value, redact)
    if isinstance(value, list):
        return [_leaves(item, redact) for item in value]
    if isinstance(value, dict):
        return {key: _leaves(item, redact) for key, item in value.items()}
    return value


def _parts(parts: Any, redact: Redact) -> Any:
    """Parts of a message, or documents: each with what names it beside what it says."""
    return [{key: _field(key, item, redact) for key, item in part.items()} for part in parts]


def _messages(messages: Any, redact: Redact) -> Any:
    return [
        {key: _parts(item, redact) if key == "parts" else _field(key, item, redact) for key, item in message.items()}
        for message in messages
    ]


def _field(key: str, item: Any, redact: Redact) -> Any:
    return item if key in _STRUCTURE else _leaves(item, redact)


def _descriptions(value: Any, redact: Redact) -> Any:
    """A tool's definition with its descriptions redacted; the rest of a schema names types and fields."""
    if isinstance(value, list):
        return [_descriptions(item, redact) for item in value]
    if isinstance(value, dict):
        return {
            key: _text(item, redact) if key == "description" and isinstance(item, str) else _descriptions(item, redact)
            for key, item in value.items()
        }
    return value


def _json(walk: Callable[[Any, Redact], Any]) -> Callable[[str, Redact], str]:
    """`walk` over JSON as text."""
    return lambda text, redact: json.dumps(walk(json.loads(text), redact), ensure_ascii=False, separators=(",", ":"))


_REDACTED_JSON: dict[str, Callable[[str, Redact], str]] = {
    semconv.GEN_AI_INPUT_MESSAGES: _json(_messages),
    semconv.GEN_AI_OUTPUT_MESSAGES: _json(_messages),
    semconv.GEN_AI_SYSTEM_INSTRUCTIONS: _json(_parts),
    semconv.GEN_AI_TOOL_DEFINITIONS: _json(_descriptions),
    semconv.GEN_AI_TOOL_CALL_ARGUMENTS: _json(_leaves),
    semconv.GEN_AI_TOOL_CALL_RESULT: _json(_leaves),
    semconv.GEN_AI_RETRIEVAL_DOCUMENTS: _json(_parts),
}
"""Attributes that hold JSON. A document, like a part, has an id beside what it says."""
