"""What messages, tool arguments, results, errors and emitters say: whether it goes on spans, and redacted how."""

import os
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from opentelemetry.trace import Span
from opentelemetry.util.types import AttributeValue

from agl.content.redaction import Redact, redacted
from agl.errors import ConfigError

CAPTURE_CONTENT = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
"""Environment variable of the OpenTelemetry GenAI conventions: `true` or `false`, or which signal carries content."""

_NOT_ON_SPANS = {"false", "0", "no", "off", "no_content", "event_only"}

_redact_of_process: Redact | None = None


def use_redaction(redact: Redact | None) -> None:
    """Redact what this process records by `redact`, wherever nothing else is said. Raises ConfigError."""
    global _redact_of_process
    _redact_of_process = _callable(redact)


def redaction_in_use() -> Redact | None:
    """What `use_redaction` was last given."""
    return _redact_of_process


@dataclass(frozen=True, slots=True)
class Content:
    """What of the content that a plugin sees goes on its spans."""

    captured: bool = True
    redact: Redact | None = None
    """Of its own: where there is none, that of the process counts."""

    @classmethod
    def of(cls, capture_content: bool | None = None, redact: Redact | None = None) -> "Content":
        """`capture_content` where it is given, else what the environment variable says.

        Without either content is captured: training reads the messages. The OpenTelemetry default is the opposite.

        `redact` is given every text in what is captured, before it is on a span: the texts of messages, every string in
        a tool's arguments and results, descriptions of tools, queries and documents, messages and stack traces of
        exceptions. Never token ids, and never what names something: ids, roles, names of tools and models, the keys of
        objects. If it raises, or returns no str, what it was asked about is left out, and logged. Where it is not
        given, the one of `agl.init` counts, also if that is called later.

        Raises ConfigError for a `redact` that cannot be called.
        """
        if capture_content is None:
            capture_content = os.environ.get(CAPTURE_CONTENT, "").strip().lower() not in _NOT_ON_SPANS
        return cls(capture_content, _callable(redact))

    @property
    def redact_in_force(self) -> Redact | None:
        return self.redact or _redact_of_process

    @property
    def is_whole(self) -> bool:
        """Whether everything goes on spans as it is."""
        return self.captured and self.redact_in_force is None

    def put(self, span: Span, describe: Callable[[], Mapping[str, AttributeValue]]) -> None:
        """Set what of `describe` may be told on `span`."""
        if span.is_recording() and (said := self.told(describe)):
            span.set_attributes(said)

    def told(self, describe: Callable[[], Mapping[str, AttributeValue]]) -> Mapping[str, AttributeValue]:
        """The attributes that `describe` makes, each without the others where one cannot be redacted.

        `describe` is asked only where content is captured.
        """
        return self.redacted(describe()) if self.captured else {}

    def redacted(self, said: Mapping[str, AttributeValue]) -> Mapping[str, AttributeValue]:
        """The attributes `said`, as they may leave the process."""
        redact = self.redact_in_force
        if redact is None:
            return said
        told = {name: redacted(name, value, redact) for name, value in said.items()}
        return {name: value for name, value in told.items() if value is not None}

    def of_error(self, error: BaseException) -> tuple[str, dict[str, AttributeValue]]:
        """What a span says of `error`: its status message, and the attributes of its `exception` event.

        An error's message often quotes what a model or a tool was told, and a stack trace ends with it. So where
        content is not captured, both are the type alone.
        """
        kind = type(error)
        named = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        if not self.captured:
            return kind.__name__, {_EXCEPTION_TYPE: named}
        said = {
            _EXCEPTION_MESSAGE: str(error),
            _EXCEPTION_STACKTRACE: "".join(traceback.format_exception(error)),
        }
        told = self.redacted(said)
        message = told.get(_EXCEPTION_MESSAGE)
        return kind.__name__ if message is None else f"{kind.__name__}: {message}", {_EXCEPTION_TYPE: named, **told}


_EXCEPTION_TYPE = "exception.type"
_EXCEPTION_MESSAGE = "exception.message"
_EXCEPTION_STACKTRACE = "exception.stacktrace"


def _callable(redact: Redact | None) -> Redact | None:
    if redact is not None and not callable(redact):
        raise ConfigError(f"redact is {redact!r}, expected a function from str to str")
    return redact
