"""Content on spans: which of it is recorded, redacted by which function, and as which JSON text."""

import os
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson
from opentelemetry.trace import Span, Status, StatusCode
from opentelemetry.util.types import AttributeValue

from agl import semconv
from agl.content.bounded import bounded_json, text_of
from agl.content.media import MAX_BYTES, MIN_CHARACTERS, note_stored, referenced
from agl.content.redaction import Redact, redact_attribute
from agl.errors import ConfigError
from agl.failsafe import never_raises

CAPTURE_CONTENT = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
"""Environment variable of the OpenTelemetry GenAI conventions: `true`, `false`, or the signal that carries content."""

_NOT_ON_SPANS = {"false", "0", "no", "off", "no_content", "event_only"}

_EXCEPTION_TYPE = "exception.type"
_EXCEPTION_MESSAGE = "exception.message"
_EXCEPTION_STACKTRACE = "exception.stacktrace"

_JSON_OPTIONS = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME

Describe = Callable[[], Mapping[str, AttributeValue]]

_process_redact: Redact | None = None
_process_max_bytes = MAX_BYTES


@dataclass(frozen=True, slots=True)
class ContentFilter:
    """Which content of a plug-in or an emitter is recorded. Facts (ids, names, numbers) never pass through here."""

    captured: bool = True
    redact: Redact | None = None
    """None: the function given to `agl.init`, if any."""

    @classmethod
    def of(cls, capture_content: bool | None = None, redact: Redact | None = None) -> "ContentFilter":
        """The filter for a plug-in's arguments.

        `capture_content` None: the environment variable decides; if it is not set, content is captured, because
        training reads the messages. (The OpenTelemetry default is not to capture.)

        `redact` receives every text of the content before it is recorded: the texts of messages, every string in tool
        arguments and results, tool descriptions, queries, documents, and the messages and stack traces of exceptions.
        It never receives token ids, roles, ids, names of tools and models, or keys of objects. If it raises or does not
        return a str, the attribute is left out and the failure is logged. None: the function given to `agl.init` is
        used, also if `agl.init` is called later.

        Raises ConfigError if `redact` is not callable.
        """
        if capture_content is None:
            capture_content = os.environ.get(CAPTURE_CONTENT, "").strip().lower() not in _NOT_ON_SPANS
        return cls(capture_content, checked_redact(redact))

    @property
    def records_everything(self) -> bool:
        """Whether all content is recorded unchanged."""
        return self.captured and self._redact_in_use is None

    @property
    def _redact_in_use(self) -> Redact | None:
        return self.redact or process_redact()

    def set_content(self, span: Span, describe: Describe) -> None:
        """Set the attributes that `describe` returns on `span`, as far as they may be recorded."""
        if span.is_recording() and (attributes := self.filtered(describe, span)):
            span.set_attributes(attributes)

    def filtered(self, describe: Describe, span: Span | None = None) -> Mapping[str, AttributeValue]:
        """The attributes of `describe` as they may be recorded. It is not called if content is not captured."""
        return self.redacted(describe(), span) if self.captured else {}

    def redacted(
        self, attributes: Mapping[str, AttributeValue], span: Span | None = None
    ) -> Mapping[str, AttributeValue]:
        """`attributes` after redaction, without those whose redaction failed.

        Media become references; their bytes are added once for the rollout that `span` is in, unless content is
        redacted: a function from str to str cannot redact them.
        """
        redact = self._redact_in_use
        media: Mapping[str, AttributeValue] = {}
        for text in attributes.values():  # not `any`, which takes twice as long, for each span
            if isinstance(text, str) and len(text) >= MIN_CHARACTERS:
                attributes, media = referenced(attributes, lambda: _rollout_of(span), _process_max_bytes)
                break
        if redact is None:
            if not media:
                return attributes
            note_stored(_rollout_of(span), media)
            return {**attributes, **media}
        redacted = {name: redact_attribute(name, value, redact) for name, value in attributes.items()}
        return {name: value for name, value in redacted.items() if value is not None}

    def mark_error(self, span: Span, error: BaseException) -> None:
        """Set the status ERROR and `error.type` on `span`, and add an `exception` event.

        An error message often quotes a prompt or a tool argument, and the stack trace ends with the message. Without
        captured content, status and event therefore have the exception's type only.
        """
        with never_raises("an exception was not recorded"):
            span.set_attribute(semconv.ERROR_TYPE, type(error).__qualname__)
            span.set_status(Status(StatusCode.ERROR, type(error).__name__))  # before code of the user is asked for text
            status, event = self._error_content(error, span)
            span.set_status(Status(StatusCode.ERROR, status))
            span.add_event("exception", event)

    def _error_content(self, error: BaseException, span: Span) -> tuple[str, dict[str, AttributeValue]]:
        """Status message, and attributes of the `exception` event."""
        kind = type(error)
        type_name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        content = self.filtered(
            lambda: {
                _EXCEPTION_MESSAGE: text_of(error),
                _EXCEPTION_STACKTRACE: text_of(error, lambda error: "".join(traceback.format_exception(error))),
            },
            span,
        )
        message = content.get(_EXCEPTION_MESSAGE)
        status = kind.__name__ if message is None else f"{kind.__name__}: {message}"
        return status, {_EXCEPTION_TYPE: type_name, **content}


def _rollout_of(span: Span | None) -> object:
    """Id of the rollout that the span of the SDK is in; outside of a rollout its trace."""
    if span is None:
        return None
    attributes: Mapping[str, AttributeValue] = getattr(span, "attributes", None) or {}
    return attributes.get(semconv.ROLLOUT_ID) or span.get_span_context().trace_id


def use_redaction(redact: Redact | None) -> None:
    """Redact by `redact` wherever a plug-in has no function of its own. Raises ConfigError if it is not callable."""
    global _process_redact
    _process_redact = checked_redact(redact)


def process_redact() -> Redact | None:
    """The function last given to `use_redaction`."""
    return _process_redact


def use_max_bytes(max_bytes: int) -> None:
    """Cut longer texts in this process. Raises ConfigError if `max_bytes` is not positive."""
    global _process_max_bytes
    if max_bytes < 1:
        raise ConfigError(f"content_max_bytes is {max_bytes}, expected at least 1")
    _process_max_bytes = max_bytes


def process_max_bytes() -> int:
    """The limit last given to `use_max_bytes`."""
    return _process_max_bytes


def checked_redact(redact: Redact | None) -> Redact | None:
    """`redact` unchanged. Raises ConfigError if it is neither None nor callable."""
    if redact is not None and not callable(redact):
        raise ConfigError(f"redact is {redact!r}, expected a function from str to str")
    return redact


def content_json(value: Any, default: Callable[[Any], Any] = str) -> str:
    """`value` as compact JSON, whatever it is; NaN and infinity become null. Never raises.

    `default` converts objects that JSON has no form for. orjson, because this runs for each message of each model call
    and `json` takes ten times as long.
    """
    try:
        return orjson.dumps(value, default, _JSON_OPTIONS).decode()
    except Exception:  # noqa: BLE001 - keys, numbers, depth and surrogates that orjson refuses, or code of the user
        return bounded_json(value, default)
