"""The pending spans of a store, as rollouts that may be decided."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Self

from agl import otlp, semconv
from agl.store.traffic import Place
from agl.trajectory.reward import read_reward

_RECORDS: Final = frozenset(
    {
        semconv.SPAN_REWARD,
        semconv.SPAN_OBSERVATION,
        semconv.SPAN_MESSAGE,
        semconv.SPAN_OBJECT,
        semconv.SPAN_ANNOTATION,
        semconv.SPAN_EXCEPTION,
        *semconv.NOT_IN_TREE,
    }
)
"""Spans that are no root of a rollout, although they may have no parent."""
_KEPT_ATTRIBUTES: Final = (semconv.ROLLOUT_ID, semconv.GROUP_ID)


@dataclass(frozen=True, slots=True)
class PendingSpan:
    """What sampling needs to know of a pending span until its rollout is decided."""

    place: Place
    arrived_ns: int
    trace_id: str
    span_id: str
    start_ns: int
    rollout_id: str | None
    """The rollout that it names; None if it names none, or its trace."""
    group_id: str | None
    asked: str | None
    answered: str | None
    """As in `SpanRow`."""
    is_root: bool
    has_reward: bool
    has_attempt: bool

    @classmethod
    def of(cls, place: Place, arrived_ns: int, body: bytes) -> Self:
        (span,) = otlp.decode(body)
        by_gateway, is_orphan = span.name == semconv.SPAN_GATEWAY_CALL, span.parent_id is None
        named = span.named_rollout if span.named_rollout != span.trace_id else None
        return cls(
            place,
            arrived_ns,
            span.trace_id,
            span.span_id,
            span.start_ns,
            named,
            span.text(semconv.GROUP_ID),
            asked=None if by_gateway else span.response_id,
            answered=span.response_id if by_gateway and is_orphan else None,
            # A call in a trace of its own may be of a rollout whose span of the request comes later.
            is_root=span.name == semconv.SPAN_ROLLOUT
            or (not named and is_orphan and not by_gateway and span.name not in _RECORDS),
            has_reward=read_reward(span) is not None,
            has_attempt=span.attempt_id is not None,
        )


@dataclass(slots=True)
class PendingRollout:
    """The pending spans of a rollout."""

    rollout_id: str
    spans: list[PendingSpan] = field(default_factory=list)

    @property
    def is_named(self) -> bool:
        return any(span.rollout_id for span in self.spans)

    @property
    def has_attempt(self) -> bool:
        return any(span.has_attempt for span in self.spans)

    @property
    def group_id(self) -> str | None:
        return next((span.group_id for span in self.spans if span.group_id), None)

    @property
    def ends_ns(self) -> list[int]:
        """When spans arrived that end it."""
        return [span.arrived_ns for span in self.spans if self._is_end(span)]

    def ready_ns(self, ended_ns: int | None, grace_ns: int, wait_ns: int) -> int:
        """When it can be decided. `ended_ns`: its end as the store knows it.

        Once it is over and has a reward, or a while after its end, or a longer while after its last span.
        """
        rewards = [span.arrived_ns for span in self.spans if span.has_reward]
        last_ns = max(span.arrived_ns for span in self.spans) + wait_ns
        over_ns = ended_ns if ended_ns is not None else min(self.ends_ns, default=None)
        if over_ns is None:
            return last_ns
        return max(over_ns, min(rewards)) if rewards else min(over_ns + grace_ns, last_ns)

    def _is_end(self, span: PendingSpan) -> bool:
        return span.is_root and (span.rollout_id is not None or span.trace_id == self.rollout_id)


def pending_rollouts(spans: Iterable[PendingSpan]) -> dict[str, PendingRollout]:
    """The rollouts of `spans`, by the rule of `agl.store.membership`.

    A span that names no rollout is of one only, also where its trace has several.
    """
    found = list(spans)
    owners = _owners(found)
    rollouts: dict[str, PendingRollout] = {}
    for span in found:
        rollout_id = _home(span, owners)
        rollouts.setdefault(rollout_id, PendingRollout(rollout_id)).spans.append(span)
    return rollouts


def _owners(spans: Sequence[PendingSpan]) -> dict[str, str]:
    """For each trace that belongs to a rollout other than itself: that rollout."""
    owners: dict[str, str] = {}
    for span in sorted((span for span in spans if span.rollout_id), key=lambda span: span.start_ns):
        owners.setdefault(span.trace_id, span.rollout_id or "")
    requests: dict[str, PendingSpan] = {}
    for span in sorted((span for span in spans if span.asked), key=lambda span: span.arrived_ns):
        requests.setdefault(span.asked or "", span)
    for answer in spans:
        request = requests.get(answer.answered or "")
        if request is None:
            continue
        if answer.rollout_id is None:
            owners.setdefault(answer.trace_id, _home(request, owners))
        elif request.rollout_id is None:
            owners.setdefault(request.trace_id, answer.rollout_id)
    return owners


def _home(span: PendingSpan, owners: Mapping[str, str]) -> str:
    return span.rollout_id or owners.get(span.trace_id, span.trace_id)
