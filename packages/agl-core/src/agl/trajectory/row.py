"""Builds training rows from the calls of a rollout.

A call continues an earlier call if its prompt starts, token for token, with the earlier prompt and response. A chain
of such calls, of one role and one policy version, is one row, in which every response trains. A call that continues
none (edited history, second response to the same prompt, different policy) starts a new row. So every sampled token
has mask 1 in exactly one row.
"""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

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
    """The first token that differs, unless the drift is `clean` or `fork`, or several answers may be meant."""


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

    Calls are processed by length of prompt, since a continuation has a longer prompt. So no clock matters, except for
    which of two continuations of the same history is the fork: the later one.
    """
    position = {id(call): index for index, call in enumerate(calls)}
    rows: list[_OpenRow] = []
    nodes: list[_CallNode] = []
    for node in sorted((_CallNode(call) for call in calls), key=lambda node: len(node.prompt)):
        row = _row_to_continue(rows, node)
        if row is None and (found := _continued_later(rows, node, position)):
            row, last = found
            rows.append(row.cut_after(last))
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

    def drift_from(self, earlier: "_CallNode") -> "_Following | None":
        """This call as one that follows `earlier`; None if it does not follow it."""
        difference = first_difference(earlier.context, self.prompt)
        if difference is None:
            return _Following(len(earlier.context), True, len(earlier.context))
        if not self.prompt.startswith(earlier.prompt):
            return None
        is_exact = earlier.context.startswith(self.prompt)
        return _Following(len(earlier.prompt), is_exact, difference.position, difference)


class _Following(NamedTuple):
    """How a call follows an earlier one. The best match is the one with the largest `rank`."""

    history: int
    """Length of the earlier call's prompt, or of prompt and response if the call has all of them; in bytes."""
    is_exact: bool
    common: int
    """Length of what both have in common; tells siblings apart, which answered the same prompt."""
    difference: Difference | None = None

    @property
    def rank(self) -> tuple[int, bool, int]:
        return self.history, self.is_exact, self.common


class _OpenRow:
    """A row that calls may still continue. Its tokens are the prompt and the response of its last call."""

    def __init__(self, node: _CallNode, drift: Drift | None, difference: Difference | None = None) -> None:
        self.nodes: list[_CallNode] = []
        self.turns: list[Turn] = []
        self.append(node, drift, difference)

    @property
    def last(self) -> _CallNode:
        return self.nodes[-1]

    def append(self, node: _CallNode, drift: Drift | None, difference: Difference | None = None) -> None:
        self.nodes.append(node)
        start, end = len(node.prompt) // ID_BYTES, len(node.context) // ID_BYTES
        self.turns.append(Turn(node.call, start, end, drift, difference))

    def cut_after(self, kept: _CallNode) -> "_OpenRow":
        """Remove the calls after `kept`, and return them as a row that forks there."""
        place = self.nodes.index(kept) + 1
        fork = _OpenRow(self.nodes[place], Drift.FORK)
        for node in self.nodes[place + 1 :]:
            fork.append(node, Drift.CLEAN)
        del self.nodes[place:], self.turns[place:]
        return fork

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


def _continued_later(
    rows: Iterable[_OpenRow], node: _CallNode, position: Mapping[int, int]
) -> tuple[_OpenRow, _CallNode] | None:
    """The row, and the call in it, that `node` continues, and that a call later than `node` continued so far."""
    found = [
        (row, before)
        for row in rows
        if row.last.policy == node.policy
        for before, after in pairwise(row.nodes)
        if position[id(node.call)] < position[id(after.call)] and node.prompt.startswith(before.context)
    ]
    return max(found, key=lambda pair: len(pair[1].context), default=None)


def _drift(earlier: Iterable[_CallNode], node: _CallNode) -> tuple[Drift | None, Difference | None]:
    """Drift of the first call of a row from the call of its role with which it shares the longest history.

    Token ids alone show a changed history as `retokenized`, and a change before the latest response as a new
    conversation. The gateway compares messages too, so its finding takes precedence. Without it, there is no difference
    if several answers match equally well: it is not known which of them was sent back.
    """
    of_role = [candidate for candidate in earlier if candidate.call.role == node.call.role]
    followed = [following for candidate in of_role if (following := node.drift_from(candidate))]
    best = max((following.rank for following in followed), default=None)
    if best is not None and best[1]:
        return Drift.FORK, None
    if node.call.drifted is not None:
        return node.call.drifted.kind, node.call.drifted.difference
    differences = {following.difference for following in followed if following.rank == best}
    if not differences:
        return None, None
    return Drift.RETOKENIZED, differences.pop() if len(differences) == 1 else None
