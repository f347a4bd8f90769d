"""A rollout as people look at it: the tree of its spans, the outcome of each model call, and what to do about it."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from agl import semconv
from agl.inspection.report import CallReport, format_reward, report_calls
from agl.inspection.transcript import Transcript
from agl.inspection.tree import walk
from agl.span import Span
from agl.tokens.drift import PREFIX_EXACT
from agl.trajectory import SpanTree, build_trajectory, collect_trained, late_rewards
from agl.trajectory.call import error_of
from agl.trajectory.join import in_one_clock
from agl.trajectory.reward import read_reward


@dataclass(frozen=True, slots=True)
class Advice:
    """Something that did not train, how many calls or rewards it concerns, and what to do."""

    reason: str
    count: int
    noun: str
    detail: str

    def __str__(self) -> str:
        return f"{self.reason} ({self.count} {self.noun}{'s' * (self.count > 1)}): {self.detail}"


class InspectedRollout:
    """The spans of one rollout. Raises TrajectoryError if they are of several."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = spans
        self.trajectory = build_trajectory(spans)
        self.reports = report_calls(self.trajectory, collect_trained(spans))
        self._late_rewards = {span.span_id for span in late_rewards(spans)}
        self.report_of = {report.call.span_id: report for report in self.reports}
        self.tree = SpanTree(in_one_clock([span for span in spans if span.name not in semconv.NOT_IN_TREE]))
        # A gateway span that is joined by response id is the root of a trace of its own: show it below the chat span.
        grafts = {call.span_id: call.chat_span_id for call in self.trajectory.calls if call.chat_span_id}
        self.walk = list(walk(self.tree, grafts))
        self.transcript = Transcript(self.trajectory.calls, self.tree.spans)

    @property
    def outcomes(self) -> Counter[str]:
        """Number of calls by outcome; the sum is the number of all calls."""
        return Counter(report.outcome for report in self.reports)

    def advice(self) -> list[Advice]:
        """What to do about the dropped calls, and the rewards without a call or too late, each once."""
        found = Counter((str(drop.reason), drop.detail) for drop in self.trajectory.drops)
        found += Counter((str(fault[0]), fault[1]) for report in self.reports if (fault := report.sampling_fault))
        advice = [Advice(reason, number, "call", detail) for (reason, detail), number in found.items()]
        if stray := self.trajectory.rewards_without_call:
            named = ", ".join(dict.fromkeys(str(reward.target) for reward in stray))
            detail = (
                f"no call of the rollout has the response id or span id {named}; pass the id of a call as the target "
                "of the reward"
            )
            advice.append(Advice("without_call", len(stray), "reward", detail))
        if self._late_rewards:
            detail = (
                "the training had already counted the rollout, so no call trained on it; emit rewards before the agent "
                "returns"
            )
            advice.append(Advice("late", len(self._late_rewards), "reward", detail))
        return advice

    def notes(self, span: Span) -> list[str]:
        """The outcome of the call that `span` records, its rewards and its error."""
        found = [*_notes(span, self.report_of.get(span.span_id), self.trajectory.mode)]
        return [*found, "late"] if span.span_id in self._late_rewards else found


def _notes(span: Span, report: CallReport | None, mode: str) -> Iterator[str]:
    if report is not None:
        yield report.describe(mode)
        if report.call.prefix not in (None, PREFIX_EXACT):
            yield f"no exact prefix: {report.call.prefix}"
        yield from (format_reward(reward) for reward in report.call.rewards)
    if span.status == "error":
        yield f"error: {error_of(span)}"
    if reward := read_reward(span):
        yield format_reward(reward)
    if reason := span.text(semconv.REWARD_MISSING):
        yield f"reward missing: {reason}"
    source, target = span.text(semconv.HANDOFF_SOURCE), span.text(semconv.HANDOFF_TARGET)
    if source and target:
        yield f"{source} → {target}"
