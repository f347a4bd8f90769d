"""`CurrentSpan`: what is attached to the OpenTelemetry context while a run is open, in place of the run's span.

A callback cannot attach a span as usual. LangChain reports the end of an async run in a copied context, where a detach
has no effect, and a generator leaves an attached span to its caller. A `CurrentSpan` delegates to the run's span while
the run is active and to the outer span otherwise. Nothing has to be detached in time, and nothing is ever detached in
the wrong place.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from opentelemetry import trace
from opentelemetry.util.types import AttributeValue


class SpanOwner(Protocol):
    """A run, as far as its current span needs it."""

    span: trace.Span

    def is_active(self) -> bool:
        """Whether the code that runs here and now belongs to the run."""
        ...


class CurrentSpan(trace.Span):
    """What `trace.get_current_span()` returns inside a run. Its `end` does nothing: the run ends its span."""

    def __init__(self, owner: SpanOwner, outer: trace.Span) -> None:
        self.owner = owner
        self._outer = outer

    def _target(self) -> trace.Span:
        return self.owner.span if self.owner.is_active() else self._outer

    def get_span_context(self) -> trace.SpanContext:
        return self._target().get_span_context()

    def is_recording(self) -> bool:
        return self._target().is_recording()

    def end(self, end_time: int | None = None) -> None:
        pass

    def set_attributes(self, attributes: Mapping[str, AttributeValue]) -> None:
        self._target().set_attributes(attributes)

    def set_attribute(self, key: str, value: AttributeValue) -> None:
        self._target().set_attribute(key, value)

    def add_event(self, *args: Any, **kwargs: Any) -> None:
        self._target().add_event(*args, **kwargs)

    def add_link(self, *args: Any, **kwargs: Any) -> None:
        self._target().add_link(*args, **kwargs)

    def update_name(self, name: str) -> None:
        self._target().update_name(name)

    def set_status(self, *args: Any, **kwargs: Any) -> None:
        self._target().set_status(*args, **kwargs)

    def record_exception(self, *args: Any, **kwargs: Any) -> None:
        self._target().record_exception(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Attributes of the SDK's spans beyond the interface, e.g. `attributes`, which users' span processors read."""
        return getattr(self._target(), name)
