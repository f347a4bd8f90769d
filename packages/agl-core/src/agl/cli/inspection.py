"""A rollout to look at: the tree of its spans, and what became of every model call."""

import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from agl import semconv
from agl.cli.terminal import align, counted, duration, printable
from agl.span import Span
from agl.tokens.drift import PREFIX_EXACT
from agl.trajectory import Call, Drop, Reward, SpanTree, Trained, Trajectory, Turn, build_trajectory, collect_trained
from agl.trajectory.agent import agent_of
from agl.trajectory.call import error_of
from agl.trajectory.clock import in_one_clock
from agl.trajectory.reward import read_reward

TRAINED, PENDING = "trained", "pending"
_HEAD = ("span", "role", "tokens", "policy", "time", "")
_LONGEST_NAME = 60
_LINE_WIDTH = 120


@dataclass(frozen=True, slots=True)
class Account:
    """What became of a call: a place in a row or a drop, and what training steps did with it."""

    call: Call
    row: int | None
    """Number of its row, from 1."""
    turn: Turn | None
    drop: Drop | None
    trained: tuple[Trained, ...]

    @property
    def end(self) -> str:
        """What it came to in the last step that saw it: `trained`, `pending`, or the reason why it did not train."""
        if self.trained:
            return self.trained[-1].reason or TRAINED
        return str(self.drop.reason) if self.drop is not None else PENDING

    def say(self, mode: str) -> str:
        """On one line, e.g. `row 1, trained in step 12, advantage +0.80`; `mode` is the rollout's."""
        if self.drop is not None:
            return f"dropped: {self.drop.reason}"
        drift = f" ({_say_drift(self.turn)})" if self.turn and self.turn.drift else ""
        untrained = "not trained yet" if mode == "train" else f"not trained on (mode {mode})"
        names_run = len({trained.run for trained in self.trained}) > 1
        words = [_say_trained(trained, names_run=names_run) for trained in self.trained]
        return ", ".join([f"row {self.row}{drift}", *(words or [untrained])])

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
    """The spans of one rollout, ready to be shown. Raises TrajectoryError where they are not of one rollout."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self.trajectory = build_trajectory(spans)
        self.accounts = _accounts(self.trajectory, collect_trained(spans))
        self._account_of = {account.call.span_id: account for account in self.accounts}
        # A gateway span that was joined by its response id stands in a trace of its own.
        grafts = {call.span_id: call.chat_span_id for call in self.trajectory.calls if call.chat_span_id}
        self._tree = SpanTree(in_one_clock([span for span in spans if span.name != semconv.SPAN_TRAINED]), grafts)

    @property
    def ends(self) -> Counter[str]:
        """How many calls came to what; the counts add up to the number of calls."""
        return Counter(account.end for account in self.accounts)

    def text(self) -> str:
        """A heading, the tree of spans, and for the dropped calls what to do."""
        tree = align([_HEAD, *(self._cells(span, lasts) for span, lasts in self._tree.walk())])
        return "\n\n".join("\n".join(lines) for lines in (self._heading(), tree, self._hints()) if lines) + "\n"

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values, spans with parents first. Ids and logprobs are not in it, only their numbers."""
        trajectory = self.trajectory
        return {
            "rollout_id": trajectory.rollout_id,
            "attempt_id": trajectory.attempt_id,
            "group_id": trajectory.group_id,
            "mode": trajectory.mode,
            "error": trajectory.error,
            "reward": trajectory.reward,
            "rewards": [asdict(reward) for reward in trajectory.rewards],
            "ends": dict(self.ends),
            "calls": [account.to_json() for account in self.accounts],
            "spans": [_span_to_json(span, len(lasts) - 1) for span, lasts in self._tree.walk()],
        }

    def _heading(self) -> list[str]:
        trajectory = self.trajectory
        names = {
            "rollout": trajectory.rollout_id,
            "attempt": trajectory.attempt_id,
            "group": trajectory.group_id,
            "mode": trajectory.mode,
        }
        lines = ["  ".join(f"{name} {printable(value)}" for name, value in names.items() if value)]
        if trajectory.error:
            lines.append(printable(f"failed: {trajectory.error}"))
        return [*lines, self._say_reward(), self._say_counts()]

    def _say_reward(self) -> str:
        whole = [reward for reward in self.trajectory.rewards if reward.target is None and reward.role is None]
        others = len(self.trajectory.rewards) - len(whole)
        said = _say_reward(whole[-1]) if whole else "no reward on the rollout"
        return said + (f"; {counted(others, 'reward')} on roles or calls" if others else "")

    def _say_counts(self) -> str:
        spans, calls = self._tree.spans, self.accounts
        dropped = Counter(str(account.drop.reason) for account in calls if account.drop)
        return (
            f"{counted(len(spans), 'span')} in {counted(len({span.trace_id for span in spans}), 'trace')}; "
            f"{counted(len(calls), 'model call')}: {len(calls) - dropped.total()} in "
            f"{counted(len(self.trajectory.rows), 'row')}, {dropped.total()} dropped{_say_reasons(dropped)}"
            + (f"; {self._say_ends()}" if any(account.trained for account in calls) else "")
        )

    def _say_ends(self) -> str:
        """e.g. `1 trained, 2 not (1 no_ids, 1 zero_advantage)`."""
        ends = self.ends
        trained = ends.pop(TRAINED, 0)
        return f"{trained} trained, {ends.total()} not{_say_reasons(ends)}"

    def _cells(self, span: Span, lasts: tuple[bool, ...]) -> tuple[str, ...]:
        account = self._account_of.get(span.span_id)
        call = account.call if account else None
        return (
            _branch(lasts) + printable(span.name, _LONGEST_NAME),
            printable(call.role if call else agent_of(span) or ""),
            _say_tokens(call) if call else "",
            printable(call.policy_version or "") if call else "",
            duration(span.end_ns - span.start_ns),
            printable("; ".join(_notes(span, account, self.trajectory.mode))),
        )

    def _hints(self) -> list[str]:
        """What to do about each kind of drop, once."""
        found = Counter((drop.reason, drop.detail) for drop in self.trajectory.drops)
        return [
            line
            for (reason, detail), number in found.items()
            for line in textwrap.wrap(
                printable(f"{reason} ({counted(number, 'call')}): {detail}"), _LINE_WIDTH, subsequent_indent="  "
            )
        ]


def _accounts(trajectory: Trajectory, trained: Mapping[str, Sequence[Trained]]) -> list[Account]:
    places = {
        id(turn.call): (number, turn) for number, row in enumerate(trajectory.rows, start=1) for turn in row.turns
    }
    drops = {id(drop.call): drop for drop in trajectory.drops}
    return [
        Account(call, *places.get(id(call), (None, None)), drops.get(id(call)), tuple(trained.get(call.span_id, ())))
        for call in trajectory.calls
    ]


def _branch(lasts: tuple[bool, ...]) -> str:
    """The lines of the tree before a span's name; roots have none."""
    if len(lasts) == 1:
        return ""
    return "".join("   " if last else "│  " for last in lasts[1:-1]) + ("└─ " if lasts[-1] else "├─ ")


def _notes(span: Span, account: Account | None, mode: str) -> Iterator[str]:
    if account is not None:
        yield account.say(mode)
        if account.call.prefix not in (None, PREFIX_EXACT):
            yield f"not from the tokens held: {account.call.prefix}"
        yield from (_say_reward(reward) for reward in account.call.rewards)
    if span.status == "error":
        yield f"error: {error_of(span)}"
    if reward := read_reward(span):
        yield _say_reward(reward)
    source, target = span.text(semconv.HANDOFF_SOURCE), span.text(semconv.HANDOFF_TARGET)
    if source and target:
        yield f"{source} → {target}"


def _say_drift(turn: Turn) -> str:
    return f"{turn.drift}: {turn.difference}" if turn.difference else str(turn.drift)


def _say_trained(trained: Trained, *, names_run: bool) -> str:
    step = f"step {trained.step}" + (f" of {printable(trained.run or '?')}" if names_run else "")
    if trained.advantage is None:
        return f"not trained in {step}: {trained.reason or 'no reason given'}"
    weight = f", weight {trained.weight:.2g}" if trained.weight is not None else ""
    return f"trained in {step}, advantage {trained.advantage:+.2f}{weight}"


def _say_reasons(counts: Mapping[str, int]) -> str:
    """` (1 no_ids, 2 stale)`; nothing for none."""
    reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(counts.items()))
    return f" ({reasons})" if reasons else ""


def _say_tokens(call: Call) -> str:
    if call.input_tokens is None and call.output_tokens is None:
        return "?"
    return f"{_or_unknown(call.input_tokens)}+{_or_unknown(call.output_tokens)}"


def _or_unknown(number: int | None) -> str:
    return "?" if number is None else str(number)


def _say_reward(reward: Reward) -> str:
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
