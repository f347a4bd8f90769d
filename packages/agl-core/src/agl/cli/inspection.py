"""The content of `agl inspect`: the tree of a rollout's spans, and the outcome of each model call."""

import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from agl.cli.terminal import align, counted, duration, printable
from agl.cli.transcript import lines_of
from agl.inspection.report import TRAINED, format_reward, format_tokens
from agl.inspection.rollout import InspectedRollout
from agl.inspection.tree import LastSiblings
from agl.span import Span
from agl.trajectory import Sampled
from agl.trajectory.attributes import agent_of
from agl.trajectory.call import error_of

_HEAD = ("span", "role", "tokens", "policy", "time", "")
_MAX_NAME_CHARS = 60
_LINE_WIDTH = 120


class Inspection(InspectedRollout):
    """Text and JSON about the spans of one rollout. Raises TrajectoryError if they are of several."""

    def __init__(self, spans: Sequence[Span], *, pending: str | None = None) -> None:
        """`pending`: why sampling has not decided the rollout yet."""
        super().__init__(spans)
        self.pending = pending

    def text(self, texts_width: int | None = None) -> str:
        """A heading, the tree of spans, and what to do about dropped calls and rewards without a call.

        With `texts_width` the texts of each span follow it, in lines of that width.
        """
        tree = align([_HEAD, *(self._cells(span, lasts) for span, lasts in self.walk)])
        if texts_width is not None:
            tree = [tree[0], *self._with_texts(tree[1:], texts_width)]
        return "\n\n".join("\n".join(lines) for lines in (self._heading(), tree, self._hints()) if lines) + "\n"

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values, spans with parents first. Numbers of tokens stand for token ids and logprobs."""
        trajectory = self.trajectory
        return {
            "rollout_id": trajectory.rollout_id,
            "attempt_id": trajectory.attempt_id,
            "group_id": trajectory.group_id,
            "mode": trajectory.mode,
            "error": trajectory.error,
            "reward": trajectory.reward,
            "pending": self.pending,
            "sampled": trajectory.sampled.to_json() if trajectory.sampled else None,
            "rewards": [asdict(reward) for reward in trajectory.rewards],
            "rewards_without_call": [asdict(reward) for reward in trajectory.rewards_without_call],
            "ends": dict(self.outcomes),
            "calls": [
                report.to_json() | asdict(self.transcript.conversations[report.call.span_id]) for report in self.reports
            ],
            "spans": [
                _span_to_json(span, len(lasts) - 1) | {"texts": [said._asdict() for said in self.transcript.own(span)]}
                for span, lasts in self.walk
            ],
        }

    def _with_texts(self, rows: Sequence[str], width: int) -> Iterator[str]:
        for row, (span, lasts) in zip(rows, self.walk, strict=True):
            yield row
            yield from lines_of(self.transcript.new_texts(span), _stems(lasts[1:]) + "  ", width)

    def _heading(self) -> list[str]:
        trajectory = self.trajectory
        values = (trajectory.rollout_id, trajectory.attempt_id, trajectory.group_id, trajectory.mode)
        names = zip(("rollout", "attempt", "group", "mode"), values, strict=True)
        lines = ["  ".join(f"{name} {printable(value)}" for name, value in names if value)]
        if trajectory.error:
            lines.append(printable(f"failed: {trajectory.error}"))
        if self.pending:
            lines.append(printable(self.pending))
        if trajectory.sampled:
            lines += map(printable, _format_sampled(trajectory.sampled, trajectory.rollout_id))
        return [*lines, self._format_rewards(), self._format_counts()]

    def _format_rewards(self) -> str:
        of_rollout = [reward for reward in self.trajectory.rewards if reward.target is None and reward.role is None]
        others = len(self.trajectory.rewards) - len(of_rollout)
        last = format_reward(of_rollout[-1]) if of_rollout else "no reward on the rollout"
        return last + (f"; {counted(others, 'reward')} on roles or calls" if others else "")

    def _format_counts(self) -> str:
        spans, calls = self.tree.spans, self.reports
        dropped = Counter(str(report.drop.reason) for report in calls if report.drop)
        return (
            f"{counted(len(spans), 'span')} in {counted(len({span.trace_id for span in spans}), 'trace')}; "
            f"{counted(len(calls), 'model call')}: {len(calls) - dropped.total()} in "
            f"{counted(len(self.trajectory.rows), 'row')}, {dropped.total()} dropped{_format_reasons(dropped)}"
            + (f"; {self._format_outcomes()}" if any(report.trained for report in calls) else "")
        )

    def _format_outcomes(self) -> str:
        """e.g. `1 trained, 2 not (1 no_ids, 1 zero_advantage)`."""
        outcomes = self.outcomes
        trained = outcomes.pop(TRAINED, 0)
        return f"{trained} trained, {outcomes.total()} not{_format_reasons(outcomes)}"

    def _cells(self, span: Span, lasts: LastSiblings) -> tuple[str, ...]:
        report = self.report_of.get(span.span_id)
        call = report.call if report else None
        return (
            _branch(lasts) + printable(span.name, _MAX_NAME_CHARS),
            printable(call.role if call else agent_of(span) or ""),
            format_tokens(call) if call else "",
            printable(call.policy_version or "") if call else "",
            duration(span.end_ns - span.start_ns),
            printable("; ".join(self.notes(span))),
        )

    def _hints(self) -> list[str]:
        """What to do about the dropped calls, and the rewards without a call or too late, each message once."""
        return [
            line
            for advice in self.advice()
            for line in textwrap.wrap(printable(str(advice)), _LINE_WIDTH, subsequent_indent="  ")
        ]


def _format_sampled(sampled: Sampled, rollout_id: str) -> Iterator[str]:
    """The decision, and the summary of a rollout whose spans are gone."""
    decision = sampled.decision
    yield decision.describe() + (f"; decided for its group {decision.unit}" if decision.unit != rollout_id else "")
    if not decision.kept:
        roles, versions = ", ".join(sampled.roles), ", ".join(sampled.versions)
        yield (
            f"it had {counted(sampled.spans, 'span')} and {counted(sampled.calls, 'model call')}"
            + (f" of {roles}" if roles else "")
            + (f" by {versions}" if versions else "")
            + f", {sampled.input_tokens}+{sampled.output_tokens} tokens"
        )


def _branch(lasts: LastSiblings) -> str:
    """The lines of the tree in front of a span's name; none for a root."""
    if len(lasts) == 1:
        return ""
    return _stems(lasts[1:-1]) + ("└─ " if lasts[-1] else "├─ ")


def _stems(lasts: LastSiblings) -> str:
    return "".join("   " if last else "│  " for last in lasts)


def _format_reasons(counts: Mapping[str, int]) -> str:
    """` (1 no_ids, 2 stale)`, or an empty string."""
    reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(counts.items()))
    return f" ({reasons})" if reasons else ""


def _span_to_json(span: Span, depth: int) -> dict[str, Any]:
    return {
        "trace_id": span.trace_id,
        "span_id": span.span_id,
        "parent_id": span.parent_id,
        "depth": depth,
        "name": span.name,
        "role": agent_of(span),
        "start_ns": span.start_ns,
        "end_ns": span.end_ns,
        "error": error_of(span) if span.status == "error" else None,
    }
