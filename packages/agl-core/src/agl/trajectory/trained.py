"""Records, as spans, what a training step did with each call, and reads those records."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from agl import semconv
from agl.span import AttributeValue, Span, now_ns
from agl.tokens.packing import pack_ratios, unpack_ratios
from agl.trajectory.attributes import read_number
from agl.trajectory.call import Call
from agl.trajectory.drop import DropReason
from agl.trajectory.join import in_one_clock
from agl.trajectory.reward import read_reward


@dataclass(frozen=True, slots=True)
class Trained:
    """The record of one call in one step: the advantage it trained with, or the reason why it did not train."""

    step: int
    advantage: float | None
    reason: str | None
    weight: float | None = None
    """Factor on the loss of each of its tokens."""
    run: str | None = None
    """Name of the training run."""
    ratios: tuple[float, ...] = ()
    """Importance ratios of its tokens; a single one is that of all. Empty: none was recorded."""

    def ratio_of(self, place: int) -> float | None:
        """Importance ratio of the token at `place` of the response; None: not recorded."""
        place = 0 if len(self.ratios) == 1 else place
        return self.ratios[place] if place < len(self.ratios) else None


def trained_span(
    call: Call,
    step: int,
    advantage: float | None,
    reason: DropReason | None = None,
    *,
    weight: float | None = None,
    run: str = "",
    ratios: Sequence[float] = (),
) -> Span:
    """A span that records that `call` trained in `step` of `run` with `advantage` and `weight`, or why it did not.

    `ratios` are the importance ratios of its tokens. The span id depends on call, run and step, so a resumed run that
    repeats a step records nothing twice.
    """
    facts: dict[str, AttributeValue | None] = {
        semconv.ROLLOUT_ID: call.rollout_id,
        semconv.ROLE: call.role,
        semconv.TRAINED_CALL: call.span_id,
        semconv.TRAINED_STEP: step,
        semconv.ATTEMPT_ID: call.attempt_id,
        semconv.TRAINED_ADVANTAGE: advantage,
        semconv.TRAINED_WEIGHT: weight,
        semconv.TRAINED_RUN: run or None,
        semconv.TRAINED_RATIOS: pack_ratios(ratios) if ratios else None,
        semconv.TRAINED_REASON: reason and reason.value,
    }
    attributes = {name: value for name, value in facts.items() if value is not None}
    now = now_ns()
    span_id = hashlib.sha256(f"{call.trace_id}{call.span_id}{step}{run}".encode()).hexdigest()[:16]
    return Span(call.trace_id, span_id, call.span_id, semconv.SPAN_TRAINED, now, now, attributes)


def collect_trained(spans: Iterable[Span]) -> dict[str, list[Trained]]:
    """The records of each call, by the call's span id: run after run, and within a run by step.

    Not by time within a run: a step that is repeated after a crash keeps its first record.
    """
    read = [(span, *record) for span in spans if (record := _read(span))]
    started: dict[str | None, int] = {}
    for span, _, trained in read:
        started[trained.run] = min(span.start_ns, started.get(trained.run, span.start_ns))
    found: dict[str, list[Trained]] = {}
    for _, call_id, trained in sorted(read, key=lambda item: (started[item[2].run], item[2].step)):
        found.setdefault(call_id, []).append(trained)
    return found


def late_rewards(spans: Sequence[Span]) -> list[Span]:
    """The reward spans of a rollout that began after all records of what steps did with its calls."""
    spans = in_one_clock(spans)
    recorded = [span.start_ns for span in spans if span.name == semconv.SPAN_TRAINED]
    return [span for span in spans if recorded and span.start_ns > max(recorded) and read_reward(span)]


def _read(span: Span) -> tuple[str, Trained] | None:
    """The call's span id and its record; None if `span` is no such record."""
    call_id, step = span.text(semconv.TRAINED_CALL), read_number(span, semconv.TRAINED_STEP)
    if span.name != semconv.SPAN_TRAINED or not call_id or step is None:
        return None
    advantage, weight = (read_number(span, name) for name in (semconv.TRAINED_ADVANTAGE, semconv.TRAINED_WEIGHT))
    reason, run = span.text(semconv.TRAINED_REASON), span.text(semconv.TRAINED_RUN)
    return call_id, Trained(int(step), advantage, reason, weight, run, _ratios(span))


def _ratios(span: Span) -> tuple[float, ...]:
    """The ratios that `span` recorded; empty if there are none, or if these are no ratios."""
    packed = span.attributes.get(semconv.TRAINED_RATIOS)
    try:
        return tuple(unpack_ratios(packed)) if isinstance(packed, bytes) else ()
    except ValueError:
        return ()
