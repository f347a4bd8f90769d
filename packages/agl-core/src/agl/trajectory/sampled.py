"""What sampling decided on a production rollout: a span of the rollout, which is all that is left of one left out."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from agl import semconv
from agl.span import AttributeValue, Span
from agl.trajectory.reward import Reward, read_reward

SPACE: Final = 2**56
_DIGITS: Final = 14


class SamplingReason(StrEnum):
    """Why a rollout is kept or left out."""

    REWARD = "reward"
    FAILED = "failed"
    MODE = "mode"
    BASE_RATE = "base_rate"
    SPAN_LIMIT = "span_limit"
    TOO_LONG = "too_long"


_REASONS: Final = {
    SamplingReason.REWARD: "a reward reached sampling.reward_threshold",
    SamplingReason.FAILED: "it failed (sampling.keep_failed)",
    SamplingReason.MODE: "only production rollouts are sampled",
    SamplingReason.BASE_RATE: "by chance (sampling.base_rate)",
    SamplingReason.SPAN_LIMIT: "its service had more spans in that minute than sampling.max_span_per_minute",
    SamplingReason.TOO_LONG: "it alone has more spans than sampling.max_span_per_minute: raise that to keep such ones",
}


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a unit, which is a group or a rollout without one, is kept, and why."""

    unit: str
    """Id of the group or the rollout."""
    kept: bool
    reason: SamplingReason
    threshold: int
    """The unit is kept if `randomness` is at least this; 0 if it is kept for certain."""

    @property
    def probability(self) -> float:
        """With which a unit like this one is kept."""
        return 1 - self.threshold / SPACE

    def trace_state(self, earlier: str = "") -> str:
        """The trace state `earlier` with threshold and randomness in its member `ot`, which comes first.

        The threshold has no trailing zeros. One of an earlier stage stays if it is higher.
        """
        members = [member for text in earlier.split(",") if (member := text.strip())]
        known = next((member[3:] for member in members if member.startswith("ot=")), "")
        fields = dict(field.split(":", 1) for field in known.split(";") if ":" in field)
        before = fields.get("th", "0")
        raised = int(before.ljust(_DIGITS, "0"), 16) if re.fullmatch(r"[0-9a-f]{1,14}", before) else 0
        threshold = _hex(max(self.threshold, raised)).rstrip("0") or "0"
        fields |= {"th": threshold, "rv": _hex(randomness(self.unit))}
        ours = "ot=" + ";".join(f"{name}:{value}" for name, value in fields.items())
        return ",".join([ours, *(member for member in members if not member.startswith("ot="))])

    def describe(self) -> str:
        """One line, e.g. `left out with probability 0.7: by chance (sampling.base_rate)`."""
        likely = self.probability if self.kept else 1 - self.probability
        certain = " for certain" if likely == 1 else f" with probability {likely:.3g}"
        return f"{'kept' if self.kept else 'left out'}{certain}: {_REASONS[self.reason]}"

    def attributes(self) -> dict[str, AttributeValue]:
        return {
            semconv.SAMPLED_UNIT: self.unit,
            semconv.SAMPLED_KEPT: self.kept,
            semconv.SAMPLED_REASON: str(self.reason),
            semconv.SAMPLED_THRESHOLD: _hex(self.threshold),
        }

    @staticmethod
    def read(attributes: Mapping[str, Any]) -> "Decision":
        """The inverse of `attributes`. Raises ValueError if they are no decision."""
        unit, kept, reason, threshold = (attributes.get(name) for name in _DECISION)
        if isinstance(unit, str) and isinstance(kept, bool) and re.fullmatch("[0-9a-f]{14,15}", str(threshold)):
            decision = Decision(unit, kept, SamplingReason(reason), int(str(threshold), 16))
            if decision.threshold <= SPACE - kept:
                return decision
        raise ValueError(f"{dict(attributes)} is no decision of sampling")


_DECISION: Final = (semconv.SAMPLED_UNIT, semconv.SAMPLED_KEPT, semconv.SAMPLED_REASON, semconv.SAMPLED_THRESHOLD)


@dataclass(frozen=True, slots=True)
class Sampled:
    """The decision on a rollout, and a summary of what it did, in all its attempts."""

    decision: Decision
    group_id: str | None
    mode: str
    spans: int
    calls: int
    input_tokens: int
    output_tokens: int
    roles: tuple[str, ...]
    versions: tuple[str, ...]
    error: str | None
    reward: Reward | None

    def to_json(self) -> dict[str, Any]:
        decision = self.decision
        return {
            "unit": decision.unit,
            "kept": decision.kept,
            "reason": decision.reason,
            "probability": decision.probability,
            "spans": self.spans,
            "calls": self.calls,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "roles": self.roles,
            "versions": self.versions,
        }


def randomness(unit: str) -> int:
    """R of a group or rollout: the first 56 bits of the SHA-256 of its id."""
    return int.from_bytes(hashlib.sha256(unit.encode()).digest()[:7])


def read_sampled(spans: Iterable[Span]) -> Sampled | None:
    """The decision on the rollout of `spans`, if there is one. Sums up its records: each late span brought another."""
    found = [(span, decision) for span in spans if (decision := _decision(span)) is not None]
    if not found:
        return None
    records = [span for span, _ in found]
    rewards = [reward for record in records if (reward := read_reward(record))]
    return Sampled(
        found[0][1],
        next((text for record in records if (text := record.text(semconv.GROUP_ID))), None),
        next((text for record in records if (text := record.text(semconv.MODE))), "prod"),
        _total(records, semconv.SAMPLED_SPANS),
        _total(records, semconv.SAMPLED_CALLS),
        _total(records, semconv.SAMPLED_INPUT_TOKENS),
        _total(records, semconv.SAMPLED_OUTPUT_TOKENS),
        _texts(records, semconv.SAMPLED_ROLES),
        _texts(records, semconv.SAMPLED_VERSIONS),
        next((text for record in records if (text := record.text(semconv.SAMPLED_ERROR))), None),
        rewards[-1] if rewards else None,
    )


def _decision(span: Span) -> Decision | None:
    """The decision that a span records; None for other spans, also those that a sender calls so."""
    try:
        return Decision.read(span.attributes) if span.name == semconv.SPAN_SAMPLED else None
    except ValueError:
        return None


def _total(records: Iterable[Span], name: str) -> int:
    return sum(value for record in records if isinstance(value := record.attributes.get(name), int))


def _texts(records: Iterable[Span], name: str) -> tuple[str, ...]:
    found = [value for record in records if isinstance(value := record.attributes.get(name), list)]
    return tuple(dict.fromkeys(str(text) for texts in found for text in texts))


def _hex(number: int) -> str:
    return f"{number:0{_DIGITS}x}"
