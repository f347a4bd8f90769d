"""A span as the store keeps it: plain values, no OpenTelemetry object."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from agl import semconv

AttributeValue = str | bool | int | float | bytes | list[str] | list[bool] | list[int] | list[float]
Status = Literal["unset", "ok", "error"]


@dataclass(frozen=True, slots=True)
class SpanEvent:
    """Something that happened at one moment of a span, e.g. an exception."""

    name: str
    time_ns: int
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Span:
    """One finished span. Ids are lower-case hex (32 digits a trace, 16 a span), times Unix nanoseconds."""

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
        """The rollout the span names, else the implicit one: its trace."""
        return self.text(semconv.ROLLOUT_ID) or self.trace_id

    @property
    def role(self) -> str | None:
        return self.text(semconv.ROLE)

    def text(self, name: str) -> str | None:
        """Attribute `name` if it is a non-empty string, else None."""
        value = self.attributes.get(name)
        return value if isinstance(value, str) and value else None

    def number(self, name: str) -> float | None:
        """Attribute `name` if it is a number (not a bool), else None."""
        value = self.attributes.get(name)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
