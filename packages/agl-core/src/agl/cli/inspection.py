"""The content of `agl inspect`: the tree of a rollout's spans, and the outcome of each model call."""

import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from agl import semconv
from agl.cli.terminal import align, counted, duration, printable
from agl.cli.transcript import Transcript, lines_of
from agl.cli.tree import LastSiblings, walk
from agl.span import Span
from agl.tokens.drift import PREFIX_EXACT
from agl.trajectory import (
    Call,
    Drop,
    DropReason,
    Reward,
    SpanTree,
    Trained,
    Trajectory,
    Turn,
    build_trajectory,
    collect_trained,
    late_rewards,
    sampling_fault,
)
from agl.trajectory.attributes import agent_of
from agl.trajectory.call import error_of
from agl.trajectory.join import in_one_clock
from agl.trajectory.reward import read_reward

TRAINED, PENDING = "trained", "pending"
_HEAD = ("span", "role", "tokens", "policy", "time", "")
_MAX_NAME_CHARS = 60
_LINE_WIDTH = 120


@dataclass(frozen=True, slots=True)
class CallReport:
    """A call's position in a row, or its drop, and what training steps did with it."""

    call: Call
    row: int | None
    """Number of its row, from 1."""
    turn: Turn | None
    drop: Drop | None
    trained: tuple[Trained, ...]

    @property
    def outcome(self) -> str:
        """`trained`, `pending`, or the reason why the call did not train; of several steps, the last."""
        if self.trained:
            return self.trained[-1].reason or TRAINED
        return str(self.drop.reason) if self.drop is not None else PENDING

    @property
    def sampling_fault(self) -> tuple[DropReason, str] | None:
        """Reason and advice if the last step did not train on the call because of how it was sampled."""
        fault = sampling_fault(self.call)
        return fault if fault is not None and self.outcome == fault[0] else None

    def describe(self, mode: str) -> str:
        """One line, e.g. `row 1, trained in step 12, advantage +0.80`; `mode` is the rollout's."""
        if self.drop is not None:
            return f"dropped: {self.drop.reason}"
        drift = f" ({_format_drift(self.turn)})" if self.turn and self.turn.drift else ""
        untrained = "not trained yet" if mode == "train" else f"not trained on (mode {mode})"
        names_run = len({trained.run for trained in self.trained}) > 1
        steps = [_format_step(trained, names_run=names_run) for trained in self.trained]
        return ", ".join([f"row {self.row}{drift}", *(steps or [untrained])])

    def to_json(self) -> dict[str, Any]:
        call = self.call
        return {
            "span_id": call.span_id,
            "chat_span_id": call.chat_span_id,
            "response_id": call.response_id,
            "choice": call.choice,
            "attempt_id": call.attempt_id,
            "role": call.role,
            "policy_version": call.policy_version,
            "prompt_tokens": call.input_tokens,
            "response_tokens": call.output_tokens,
            "finish_reason": call.finish_reason,
            "error": call.error,
            "rewards": [asdict(reward) for reward in call.rewards],
            "row": self.row,
            "drift": self.turn.drift if self.turn else None,
            "difference": asdict(self.turn.difference) if self.turn and self.turn.difference else None,
            "prefix": call.prefix,
            "drop": {"reason": self.drop.reason, "detail": self.drop.detail} if self.drop else None,
            "trained": [asdict(trained) for trained in self.trained],
        }


class Inspection:
    """Text and JSON about the spans of one rollout. Raises TrajectoryError if they are of several."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self.trajectory = build_trajectory(spans)
        self.reports = _report_calls(self.trajectory, collect_trained(spans))
        self._late_rewards = {span.span_id for span in late_rewards(spans)}
        self._report_of = {report.call.span_id: report for report in self.reports}
        self._tree = SpanTree(in_one_clock([span for span in spans if span.name not in semconv.NOT_IN_TREE]))
        # A gateway span that is joined by response id is the root of a trace of its own: show it below the chat span.
        grafts = {call.span_id: call.chat_span_id for call in self.trajectory.calls if call.chat_span_id}
        self._walk = list(walk(self._tree, grafts))
        self._transcript = Transcript(self.trajectory.calls, self._tree.spans)

    @property
    def outcomes(self) -> Counter[str]:
        """Number of calls by outcome; the sum is the number of all calls."""
        return Counter(report.outcome for report in self.reports)

    def text(self, texts_width: int | None = None) -> str:
        """A heading, the tree of spans, and what to do about dropped calls and rewards without a call.

        With `texts_width` the texts of each span follow it, in lines of that width.
        """
        tree = align([_HEAD, *(self._cells(span, lasts) for span, lasts in self._walk)])
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
            "rewards": [asdict(reward) for reward in trajectory.rewards],
            "rewards_without_call": [asdict(reward) for reward in trajectory.rewards_without_call],
            "ends": dict(self.outcomes),
            "calls": [
                report.to_json() | asdict(self._transcript.conversations[report.call.span_id])
                for report in self.reports
            ],
            "spans": [
                _span_to_json(span, len(lasts) - 1) | {"texts": [said._asdict() for said in self._transcript.own(span)]}
                for span, lasts in self._walk
            ],
        }

    def _with_texts(self, rows: Sequence[str], width: int) -> Iterator[str]:
        for row, (span, lasts) in zip(rows, self._walk, strict=True):
            yield row
            yield from lines_of(self._transcript.new_texts(span), _stems(lasts[1:]) + "  ", width)

    def _heading(self) -> list[str]:
        trajectory = self.trajectory
        values = (trajectory.rollout_id, trajectory.attempt_id, trajectory.group_id, trajectory.mode)
        names = zip(("rollout", "attempt", "group", "mode"), values, strict=True)
        lines = ["  ".join(f"{name} {printable(value)}" for name, value in names if value)]
        if trajectory.error:
            lines.append(printable(f"failed: {trajectory.error}"))
        return [*lines, self._format_rewards(), self._format_counts()]

    def _format_rewards(self) -> str:
        of_rollout = [reward for reward in self.trajectory.rewards if reward.target is None and reward.role is None]
        others = len(self.trajectory.rewards) - len(of_rollout)
        last = _format_reward(of_rollout[-1]) if of_rollout else "no reward on the rollout"
        return last + (f"; {counted(others, 'reward')} on roles or calls" if others else "")

    def _format_counts(self) -> str:
        spans, calls = self._tree.spans, self.reports
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
        report = self._report_of.get(span.span_id)
        call = report.call if report else None
        return (
            _branch(lasts) + printable(span.name, _MAX_NAME_CHARS),
            printable(call.role if call else agent_of(span) or ""),
            _format_tokens(call) if call else "",
            printable(call.policy_version or "") if call else "",
            duration(span.end_ns - span.start_ns),
            printable("; ".join([*_notes(span, report, self.trajectory.mode), *self._lateness(span)])),
        )

    def _hints(self) -> list[str]:
        """What to do about the dropped calls, and the rewards without a call or too late, each message once."""
        found = Counter((drop.reason, drop.detail) for drop in self.trajectory.drops)
        found += Counter(fault for report in self.reports if (fault := report.sampling_fault))
        hints = [f"{reason} ({counted(number, 'call')}): {detail}" for (reason, detail), number in found.items()]
        if stray := self.trajectory.rewards_without_call:
            named = ", ".join(dict.fromkeys(str(reward.target) for reward in stray))
            hints.append(
                f"without_call ({counted(len(stray), 'reward')}): no call of the rollout has the response id or span "
                f"id {named}; pass the id of a call as the target of the reward"
            )
        if self._late_rewards:
            hints.append(
                f"late ({counted(len(self._late_rewards), 'reward')}): the training had already counted the rollout, "
                "so no call trained on it; emit rewards before the agent returns"
            )
        return [line for hint in hints for line in textwrap.wrap(printable(hint), _LINE_WIDTH, subsequent_indent="  ")]

    def _lateness(self, span: Span) -> list[str]:
        return ["late"] if span.span_id in self._late_rewards else []


def _report_calls(trajectory: Trajectory, trained: Mapping[str, Sequence[Trained]]) -> list[CallReport]:
    rows = enumerate(trajectory.rows, start=1)
    positions = {id(turn.call): (number, turn) for number, row in rows for turn in row.turns}
    drops = {id(drop.call): drop for drop in trajectory.drops}
    no_row = (None, None)
    return [
        CallReport(call, *positions.get(id(call), no_row), drops.get(id(call)), tuple(trained.get(call.span_id, ())))
        for call in trajectory.calls
    ]


def _branch(lasts: LastSiblings) -> str:
    """The lines of the tree in front of a span's name; none for a root."""
    if len(lasts) == 1:
        return ""
    return _stems(lasts[1:-1]) + ("└─ " if lasts[-1] else "├─ ")


def _stems(lasts: LastSiblings) -> str:
    return "".join("   " if last else "│  " for last in lasts)


def _notes(span: Span, report: CallReport | None, mode: str) -> Iterator[str]:
    if report is not None:
        yield report.describe(mode)
        if report.call.prefix not in (None, PREFIX_EXACT):
            yield f"no exact prefix: {report.call.prefix}"
        yield from (_format_reward(reward) for reward in report.call.rewards)
    if span.status == "error":
        yield f"error: {error_of(span)}"
    if reward := read_reward(span):
        yield _format_reward(reward)
    source, target = span.text(semconv.HANDOFF_SOURCE), span.text(semconv.HANDOFF_TARGET)
    if source and target:
        yield f"{source} → {target}"


def _format_drift(turn: Turn) -> str:
    return f"{turn.drift}: {turn.difference}" if turn.difference else str(turn.drift)


def _format_step(trained: Trained, *, names_run: bool) -> str:
    step = f"step {trained.step}" + (f" of {printable(trained.run or '?')}" if names_run else "")
    if trained.advantage is None:
        return f"not trained in {step}: {trained.reason or 'no reason given'}"
    weight = f", weight {trained.weight:.2g}" if trained.weight is not None else ""
    return f"trained in {step}, advantage {trained.advantage:+.2f}{weight}"


def _format_reasons(counts: Mapping[str, int]) -> str:
    """` (1 no_ids, 2 stale)`, or an empty string."""
    reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(counts.items()))
    return f" ({reasons})" if reasons else ""


def _format_tokens(call: Call) -> str:
    """`<prompt>+<response>`, `?` for an unknown number."""
    if call.input_tokens is None and call.output_tokens is None:
        return "?"
    return "+".join("?" if number is None else str(number) for number in (call.input_tokens, call.output_tokens))


def _format_reward(reward: Reward) -> str:
    parts = ", ".join(f"{name} {value:.3g}" for name, value in reward.dimensions.items())
    target = f" for {reward.target}" if reward.target else f" for role {reward.role}" if reward.role else ""
    return f"reward {reward.value:.3g}" + (f" ({parts})" if parts else "") + target


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
