"""Builds training rows from the calls of a rollout.

A call continues an earlier call if its prompt starts, token for token, with the earlier prompt and response. A chain
of such calls, of one role and one policy version, is one row, in which every response trains. A call that continues
none (edited history, second response to the same prompt, different policy) starts a new row. So every sampled token
has mask 1 in exactly one row.
"""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from agl.tokens.drift import Difference, Drift, first_difference
from agl.tokens.packing import ID_BYTES, array_of_ids
from agl.trajectory.call import Call
from agl.trajectory.reward import Reward, last_reward


@dataclass(frozen=True, slots=True)
class Turn:
    """A call in a row: its response is `token_ids[start:end]`."""

    call: Call
    start: int
    end: int
    drift: Drift | None
    """How its prompt relates to the previous call's tokens; None for the first call of a conversation."""
    difference: Difference | None = None
    """The first token that differs, unless the drift is `clean` or `fork`."""


@dataclass(frozen=True, slots=True)
class Row:
    """One training sequence. On responses `loss_mask` is 1 and `logprobs` are as sampled; elsewhere both are 0."""

    rollout_id: str
    role: str
    version: str | None
    """Policy version that sampled all of its responses."""
    packed_ids: bytes
    """Token ids, packed (see `agl.tokens.packing`)."""
    loss_mask: list[int]
    logprobs: list[float]
    turns: tuple[Turn, ...]
    reward: float | None
    """The last reward of its role, else of the rollout. Rewards of single calls are in `turns[i].call.rewards`."""

    @property
    def ids(self) -> "array[int]":
        """Token ids as an array of int32."""
        return array_of_ids(self.packed_ids)

    @property
    def token_ids(self) -> list[int]:
        return self.ids.tolist()

    @property
    def call_ids(self) -> list[str]:
        """Span ids of the calls, in order."""
        return [turn.call.span_id for turn in self.turns]


def build_rows(calls: Sequence[Call], rewards: Sequence[Reward]) -> list[Row]:
    """Rows in the order of their first calls. All `calls` must have token ids and logprobs.

    Calls are processed by length of prompt, since a continuation has a longer prompt. So no clock matters.
    """
    position = {id(call): index for index, call in enumerate(calls)}
    rows: list[_OpenRow] = []
    nodes: list[_CallNode] = []
    for node in sorted((_CallNode(call) for call in calls), key=lambda node: len(node.prompt)):
        row = _row_to_continue(rows, node)
        if row is None:
            rows.append(_OpenRow(node, *_drift(nodes, node)))
        else:
            row.append(node, Drift.CLEAN)
        nodes.append(node)
    rows.sort(key=lambda row: position[id(row.turns[0].call)])
    return [row.close(rewards) for row in rows]


class _CallNode:
    """A call with its tokens packed, so that comparing prefixes is comparing memory."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.prompt = call.packed_prompt or b""
        self.context = self.prompt + (call.packed_response or b"")

    @property
    def policy(self) -> tuple[str, str | None]:
        return self.call.role, self.call.policy_version

    def drift_from(self, earlier: "_CallNode") -> tuple[int, bool, Drift] | None:
        """Rank and drift of this call as one that follows `earlier`; None if it does not follow it.

        The rank is the length of the history that they share, in bytes, then whether that history is exact.
        """
        if self.prompt.startswith(earlier.context):
            return len(earlier.context), True, Drift.FORK
        if not self.prompt.startswith(earlier.prompt):
            return None
        is_exact = earlier.context.startswith(self.prompt)
        return len(earlier.prompt), is_exact, Drift.FORK if is_exact else Drift.RETOKENIZED


class _OpenRow:
    """A row that calls may still continue. Its tokens are the prompt and the response of its last call."""

    def __init__(self, node: _CallNode, drift: Drift | None, difference: Difference | None) -> None:
        self.turns: list[Turn] = []
        self.append(node, drift, difference)

    def append(self, node: _CallNode, drift: Drift | None, difference: Difference | None = None) -> None:
        self.last = node
        start, end = len(node.prompt) // ID_BYTES, len(node.context) // ID_BYTES
        self.turns.append(Turn(node.call, start, end, drift, difference))

    def close(self, rewards: Sequence[Reward]) -> Row:
        ids, call = self.last.context, self.last.call
        mask, logprobs = [0] * self.turns[-1].end, [0.0] * self.turns[-1].end
        for turn in self.turns:
            mask[turn.start : turn.end] = [1] * (turn.end - turn.start)
            logprobs[turn.start : turn.end] = turn.call.logprobs or ()
        of_role = last_reward(rewards, call.role)
        reward = last_reward(rewards, None) if of_role is None else of_role
        return Row(call.rollout_id, call.role, call.policy_version, ids, mask, logprobs, tuple(self.turns), reward)


def _row_to_continue(rows: Iterable[_OpenRow], node: _CallNode) -> _OpenRow | None:
    """The longest row of the same policy whose tokens are all a prefix of the prompt."""
    fitting = [row for row in rows if row.last.policy == node.policy and node.prompt.startswith(row.last.context)]
    return max(fitting, key=lambda row: len(row.last.context), default=None)


def _drift(earlier: Iterable[_CallNode], node: _CallNode) -> tuple[Drift | None, Difference | None]:
    """Drift of the first call of a row from the call of its role with which it shares the longest history.

    Token ids alone show a changed history as `retokenized`, and a change before the latest response as a new
    conversation. The gateway compares messages too, so its finding takes precedence.
    """
    of_role = [candidate for candidate in earlier if candidate.call.role == node.call.role]
    ranked = [(drift, candidate) for candidate in of_role if (drift := node.drift_from(candidate))]
    (_, _, kind), last = max(ranked, key=lambda found: found[0], default=((0, False, None), None))
    if kind == Drift.FORK:
        return kind, None
    if node.call.drifted is not None:
        return node.call.drifted.kind, node.call.drifted.difference
    return kind, first_difference(last.context, node.prompt) if last is not None else None
