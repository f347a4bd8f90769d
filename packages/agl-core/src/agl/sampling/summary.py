"""The summary of a pending rollout, from which sampling decides and which it leaves in the store."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from agl import semconv
from agl.canary.observation import measured
from agl.errors import TrajectoryError
from agl.sampling.pending import PendingRollout
from agl.span import AttributeValue, Span
from agl.trajectory import Decision, Reward, Trajectory, build_trajectory
from agl.trajectory.call import error_of

_SERVICE = "service.name"
_SCOPE = "agl.sampling"
_OF_CALLS = (
    semconv.CANARY_ID,
    semconv.CANARY_ARM,
    semconv.CANARY_KEY,
    semconv.CANARY_VERSION,
    semconv.POLICY_VERSION,
)
"""Attributes of a call that the record has in its place."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What a rollout did, in all its attempts and traces."""

    rollout_id: str
    group_id: str | None
    mode: str
    service: str
    reward: float | None
    """Its reward; if only its roles have rewards, the highest of these."""
    error: str | None
    spans: int
    traces: Sequence[str]
    key: bytes
    """The same however often these spans are summed up."""
    start_ns: int
    end_ns: int
    attributes: Mapping[str, AttributeValue]

    @classmethod
    def of(
        cls, rollout: PendingRollout, group_id: str | None, spans: Sequence[Span], error: str | None, claim: str
    ) -> "Summary":
        """`error`: of the rollout as the store knows it. `claim`: names the spans that are decided with these."""
        unique = {(span.trace_id, span.span_id): span for span in spans}
        found = sorted(unique.values(), key=lambda span: span.start_ns)
        trajectory = _trajectory(found)
        error = error or (trajectory and trajectory.error) or _root_error(rollout, found)
        return cls(
            rollout.rollout_id,
            group_id,
            trajectory.mode if trajectory else "prod",
            next((name for span in found if isinstance(name := span.resource.get(_SERVICE), str)), "unknown_service"),
            _reward(trajectory) if trajectory else None,
            error,
            len(found),
            list(dict.fromkeys(span.trace_id for span in found)),
            hashlib.sha256(f"{rollout.rollout_id}{claim}".encode()).digest(),
            found[0].start_ns,
            max(span.end_ns for span in found),
            _counts(trajectory, len(found), error) | _canary(found) | measured(found),
        )

    def records(self, decision: Decision) -> Iterator[Span]:
        """The spans that record `decision`: one in each trace, so that a late span of it finds it; the first counts."""
        named = {semconv.ROLLOUT_ID: self.rollout_id, semconv.MODE: self.mode} | decision.attributes()
        if self.group_id is not None:
            named[semconv.GROUP_ID] = self.group_id
        summary = {name: value for name, value in self.attributes.items() if not decision.kept or name not in _OF_CALLS}
        for number, trace_id in enumerate(self.traces if not decision.kept else self.traces[:1]):
            yield Span(
                trace_id,
                hashlib.sha256(self.key + bytes([number % 256])).digest()[:8].hex(),
                None,
                semconv.SPAN_SAMPLED,
                self.start_ns,
                self.end_ns,
                named if number else named | summary,
                resource={_SERVICE: self.service},
                scope=_SCOPE,
            )


def _trajectory(spans: Sequence[Span]) -> Trajectory | None:
    try:
        return build_trajectory(spans)
    except TrajectoryError:  # Media only, for example: they came late.
        return None


def _root_error(rollout: PendingRollout, spans: Sequence[Span]) -> str | None:
    """Error of the root span of a rollout that no span names."""
    roots = {span.span_id for span in rollout.spans if span.is_root and span.trace_id == rollout.rollout_id}
    return next((error_of(span) for span in spans if span.span_id in roots and span.status == "error"), None)


def _counts(trajectory: Trajectory | None, spans: int, error: str | None) -> dict[str, AttributeValue]:
    calls = trajectory.calls if trajectory else []
    versions = dict.fromkeys(call.policy_version for call in calls if call.policy_version)
    counts: dict[str, AttributeValue] = {
        semconv.SAMPLED_SPANS: spans,
        semconv.SAMPLED_CALLS: len(calls),
        semconv.SAMPLED_INPUT_TOKENS: sum(call.input_tokens or 0 for call in calls),
        semconv.SAMPLED_OUTPUT_TOKENS: sum(call.output_tokens or 0 for call in calls),
        semconv.SAMPLED_ROLES: [*dict.fromkeys(call.role for call in calls)],
        semconv.SAMPLED_VERSIONS: [*versions],
    }
    if error is not None:
        counts[semconv.SAMPLED_ERROR] = error
    if trajectory and (reward := _last(trajectory, None)):
        counts[semconv.REWARD_VALUE] = reward.value
        counts |= {semconv.REWARD_PREFIX + name: value for name, value in reward.dimensions.items()}
    return counts


def _canary(spans: Sequence[Span]) -> dict[str, AttributeValue]:
    """What a canary reads from its calls: those of one that another version answered than expected, if there is one."""
    calls = [span for span in spans if span.text(semconv.CANARY_VERSION)]
    unproved = (
        call
        for call in calls
        if call.status != "error" and call.text(semconv.POLICY_VERSION) != call.text(semconv.CANARY_VERSION)
    )
    call = next(unproved, calls[0] if calls else None)
    return {name: value for name in _OF_CALLS if call and (value := call.attributes.get(name)) is not None}


def _reward(trajectory: Trajectory) -> float | None:
    last = (_last(trajectory, role) for role in {reward.role for reward in trajectory.rewards})
    return trajectory.reward if trajectory.reward is not None else max((r.value for r in last if r), default=None)


def _last(trajectory: Trajectory, role: str | None) -> Reward | None:
    found = [reward for reward in trajectory.rewards if reward.target is None and reward.role == role]
    return found[-1] if found else None
