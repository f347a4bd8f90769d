"""The span type of stores and trajectories: plain values, independent of the OpenTelemetry SDK."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from agl import semconv

AttributeValue = str | bool | int | float | bytes | list[str] | list[bool] | list[int] | list[float]
Status = Literal["unset", "ok", "error"]

_AGENTLIGHTNING_ROLLOUT, _AGENTLIGHTNING_ATTEMPT = "agentlightning.rollout_id", "agentlightning.attempt_id"
_OPENINFERENCE_KIND, _OPENINFERENCE_RESPONSE = "openinference.span.kind", "output.value"

COLUMN_ATTRIBUTES: Final = frozenset(
    {semconv.ROLLOUT_ID, semconv.ATTEMPT_ID, semconv.MODE, semconv.GEN_AI_RESPONSE_ID}
    | {_AGENTLIGHTNING_ROLLOUT, _AGENTLIGHTNING_ATTEMPT, _OPENINFERENCE_KIND, _OPENINFERENCE_RESPONSE}
)
"""The attributes from which `rollout_id`, `attempt_id`, the mode and `response_id` are read."""

_offset_ns = 0
"""The system's clock minus the monotonic clock: the most that was seen."""


def now_ns() -> int:
    """The time in ns since 1970, for spans. Never earlier than before in this process, as the system's clock may be.

    The order of the calls of a rollout decides what they earn.
    """
    global _offset_ns
    _offset_ns = max(_offset_ns, time.time_ns() - time.monotonic_ns())
    return time.monotonic_ns() + _offset_ns


@dataclass(frozen=True, slots=True)
class SpanEvent:
    """An event at one moment of a span, e.g. an exception."""

    name: str
    time_ns: int
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)


class SpanAttributes:
    """Ids of the rollout, attempt and response, read from the attributes of a span."""

    __slots__ = ()

    attributes: Mapping[str, AttributeValue]
    resource: Mapping[str, AttributeValue]

    @property
    def named_rollout(self) -> str | None:
        """The rollout that the span names; None if it names none."""
        return self.text(semconv.ROLLOUT_ID) or self._agentlightning_id(_AGENTLIGHTNING_ROLLOUT)

    @property
    def attempt_id(self) -> str | None:
        """The attempt that the span names."""
        return self.text(semconv.ATTEMPT_ID) or self._agentlightning_id(_AGENTLIGHTNING_ATTEMPT)

    @property
    def response_id(self) -> str | None:
        """Id of the model's response. OpenInference records it only within the JSON of the response."""
        return self.text(semconv.GEN_AI_RESPONSE_ID) or self._openinference_response_id()

    def text(self, name: str) -> str | None:
        """Attribute `name` if it is a non-empty string, else None."""
        value = self.attributes.get(name)
        return value if isinstance(value, str) and value else None

    def number(self, name: str) -> float | None:
        """Attribute `name` if it is a number (not a bool), else None."""
        value = self.attributes.get(name)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

    def _agentlightning_id(self, name: str) -> str | None:
        """An id of agentlightning, which is on the span or on the resource."""
        found = self.attributes.get(name) or self.resource.get(name)
        return found if isinstance(found, str) and found else None

    def _openinference_response_id(self) -> str | None:
        response = self.text(_OPENINFERENCE_RESPONSE)
        if response is None or self.text(_OPENINFERENCE_KIND) != "LLM":
            return None
        try:
            data = json.loads(response)
        except (ValueError, RecursionError):  # The text is redacted or truncated.
            return None
        of_langchain = data.get("llm_output") if isinstance(data, dict) else None
        holder = of_langchain if isinstance(of_langchain, dict) else data
        found = holder.get("id") if isinstance(holder, dict) else None
        return found if isinstance(found, str) and found else None


@dataclass(frozen=True, slots=True)
class Span(SpanAttributes):
    """One finished span. Ids are lower-case hex (trace: 32 digits, span: 16 digits), times are Unix nanoseconds."""

    trace_id: str
    span_id: str
    parent_id: str | None
    name: str
    start_ns: int
    end_ns: int
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)
    status: Status = "unset"
    status_message: str = ""
    kind: int = 1
    events: tuple[SpanEvent, ...] = ()
    resource: Mapping[str, AttributeValue] = field(default_factory=dict)
    scope: str = ""

    @property
    def rollout_id(self) -> str:
        """The rollout that the span names, else its trace (an implicit rollout)."""
        return self.named_rollout or self.trace_id

    @property
    def role(self) -> str | None:
        return self.text(semconv.ROLE)
