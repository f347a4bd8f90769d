"""What a training step did with a call, as a span beside it."""

import hashlib
import time
from collections.abc import Iterable
from dataclasses import dataclass

from agl import semconv
from agl.span import AttributeValue, Span
from agl.trajectory.aliases import read_number
from agl.trajectory.call import Call
from agl.trajectory.drop import DropReason


@dataclass(frozen=True, slots=True)
class Trained:
    """A step's word on a call: the advantage it trained with, or the reason why it did not."""

    step: int
    advantage: float | None
    reason: str | None
    weight: float | None = None
    """Factor on the loss of each of its tokens."""
    run: str | None = None
    """The training that the step is of."""


def trained_span(
    call: Call,
    step: int,
    advantage: float | None,
    reason: DropReason | None = None,
    *,
    weight: float | None = None,
    run: str = "",
) -> Span:
    """A span that records what `step` of training `run` did with `call`: `advantage` and `weight`, or why it did not
    train.

    The same call, run and step give the same span id, so a resumed run that repeats its step records nothing twice.
    """
    attributes: dict[str, AttributeValue] = {
        semconv.ROLLOUT_ID: call.rollout_id,
        semconv.ROLE: call.role,
        semconv.TRAINED_CALL: call.span_id,
        semconv.TRAINED_STEP: step,
    }
    if call.attempt_id is not None:
        attributes[semconv.ATTEMPT_ID] = call.attempt_id
    if advantage is not None:
        attributes[semconv.TRAINED_ADVANTAGE] = advantage
    if weight is not None:
        attributes[semconv.TRAINED_WEIGHT] = weight
    if run:
        attributes[semconv.TRAINED_RUN] = run
    if reason is not None:
        attributes[semconv.TRAINED_REASON] = reason.value
    now = time.time_ns()
    span_id = hashlib.sha256(f"{call.trace_id}{call.span_id}{step}{run}".encode()).hexdigest()[:16]
    return Span(call.trace_id, span_id, call.span_id, semconv.SPAN_TRAINED, now, now, attributes)


def collect_trained(spans: Iterable[Span]) -> dict[str, list[Trained]]:
    """What steps did with each call, by the call's span id: one training after the other, each in order of its steps.

    Not by the clock within a training: a step that is done again after a crash is not written anew.
    """
    told = [(span, word) for span in spans if (word := _read(span))]
    started: dict[str | None, int] = {}
    for span, (_, word) in told:
        started[word.run] = min(span.start_ns, started.get(word.run, span.start_ns))
    found: dict[str, list[Trained]] = {}
    for _, (call_id, word) in sorted(told, key=lambda one: (started[one[1][1].run], one[1][1].step)):
        found.setdefault(call_id, []).append(word)
    return found


def _read(span: Span) -> tuple[str, Trained] | None:
    """The call's span id and the word on it; None for other spans."""
    call_id, step = span.text(semconv.TRAINED_CALL), read_number(span, semconv.TRAINED_STEP)
    if span.name != semconv.SPAN_TRAINED or not call_id or step is None:
        return None
    advantage, weight = (read_number(span, name) for name in (semconv.TRAINED_ADVANTAGE, semconv.TRAINED_WEIGHT))
    reason, run = span.text(semconv.TRAINED_REASON), span.text(semconv.TRAINED_RUN)
    return call_id, Trained(int(step), advantage, reason, weight, run)
