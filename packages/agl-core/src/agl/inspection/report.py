"""What happened to each model call of a rollout: its row, or why it is in none, and what training steps did with it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from agl.trajectory import Call, Drop, DropReason, Reward, Trained, Trajectory, Turn, sampling_fault

TRAINED: Final = "trained"
PENDING: Final = "pending"


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


def report_calls(trajectory: Trajectory, trained: Mapping[str, Sequence[Trained]]) -> list[CallReport]:
    rows = enumerate(trajectory.rows, start=1)
    positions = {id(turn.call): (number, turn) for number, row in rows for turn in row.turns}
    drops = {id(drop.call): drop for drop in trajectory.drops}
    no_row = (None, None)
    return [
        CallReport(call, *positions.get(id(call), no_row), drops.get(id(call)), tuple(trained.get(call.span_id, ())))
        for call in trajectory.calls
    ]


def format_tokens(call: Call) -> str:
    """`<prompt>+<response>`, `?` for an unknown number."""
    if call.input_tokens is None and call.output_tokens is None:
        return "?"
    return "+".join("?" if number is None else str(number) for number in (call.input_tokens, call.output_tokens))


def format_reward(reward: Reward) -> str:
    parts = ", ".join(f"{name} {value:.3g}" for name, value in reward.dimensions.items())
    target = f" for {reward.target}" if reward.target else f" for role {reward.role}" if reward.role else ""
    return f"reward {reward.value:.3g}" + (f" ({parts})" if parts else "") + target


def _format_drift(turn: Turn) -> str:
    return f"{turn.drift}: {turn.difference}" if turn.difference else str(turn.drift)


def _format_step(trained: Trained, *, names_run: bool) -> str:
    step = f"step {trained.step}" + (f" of {trained.run or '?'}" if names_run else "")
    if trained.advantage is None:
        return f"not trained in {step}: {trained.reason or 'no reason given'}"
    weight = f", weight {trained.weight:.2g}" if trained.weight is not None else ""
    low, high = (f"{bound(trained.ratios, default=1.0):.3g}" for bound in (min, max))
    ratio = f", ratio {low}" + (f" to {high}" if high != low else "") if trained.ratios else ""
    return f"trained in {step}, advantage {trained.advantage:+.2f}{weight}{ratio}"
