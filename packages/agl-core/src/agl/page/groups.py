"""Groups: the rollouts of one task side by side."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any, Final, Self

from agl.errors import UnknownIdError
from agl.inspection.conversation import read_conversation, text_of
from agl.inspection.listing import ListedRollout, read_listed
from agl.store import Store

_GROUPS: Final = 15
_SEARCH_S: Final = 0.5
_PAGE: Final = 20
_EQUAL: Final = 1e-9
_QUOTED: Final = 40
"""Characters of an answer in a sentence about it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A role's answer in a rollout: how it begins like that of its place in the best rollout, and the rest."""

    role: str
    common: str
    rest: str


@dataclass(frozen=True, slots=True)
class Member:
    """A rollout of a group."""

    listed: ListedRollout
    answers: list[Answer]
    advantages: Mapping[str, float]
    """By role, from the last step that trained it."""
    same_as: str | None
    """The first of the rollouts before it that gave the same answers."""

    @property
    def parts(self) -> Mapping[str, float]:
        rewards = self.listed.trajectory.rewards
        whole = [reward.dimensions for reward in rewards if reward.target is None and reward.role is None]
        return whole[-1] if whole else {}


@dataclass(frozen=True, slots=True)
class Group:
    """The rollouts of a group that have spans, the best first."""

    group_id: str
    task: Any
    queued: int
    members: list[Member]

    @classmethod
    def of(cls, store: Store, group_id: str) -> Self:
        """Raises UnknownIdError if no rollout of the group was queued."""
        queued = store.query_rollouts(group_id)
        if not queued:
            raise UnknownIdError(f"no rollout of group {group_id!r} was queued in {store.uri}")
        listed = [*read_listed(store, [rollout.rollout_id for rollout in queued]).values()]
        listed.sort(key=lambda one: -(one.reward if one.reward is not None else float("-inf")))
        return cls(group_id, queued[0].input, len(queued), _members(listed))

    @property
    def rewards(self) -> list[float]:
        return [member.listed.reward for member in self.members if member.listed.reward is not None]

    @property
    def mean(self) -> float | None:
        return sum(self.rewards) / len(self.rewards) if self.rewards else None

    @property
    def is_equal(self) -> bool:
        """All rollouts earned the same: nothing to learn from."""
        return len(self.rewards) > 1 and max(self.rewards) - min(self.rewards) < _EQUAL

    def verdict(self) -> str:
        """Why the best rollout won."""
        if len(self.rewards) < 2:
            return "Fewer than two rollouts have a reward, so there is nothing to compare."
        if self.is_equal:
            return f"All {len(self.rewards)} rollouts earned {self.rewards[0]:.3g}, so this group taught nothing."
        best, others = self.members[0], [m for m in self.members[1:] if m.listed.reward is not None]
        gaps = {
            name: value - sum(other.parts.get(name, 0.0) for other in others) / len(others)
            for name, value in best.parts.items()
        }
        ordered = sorted(gaps.items(), key=lambda item: -abs(item[1]))
        told = ", ".join(f"{name} {gap:+.3g}" for name, gap in ordered if abs(gap) > _EQUAL)
        against = f": {told} against the mean of the others" if told else ""
        mean = sum(self.rewards[1:]) / len(others)
        return f"The best rollout earned {self.rewards[0]:.3g}, the others {mean:.3g}{against}."

    def difference(self) -> str:
        """How many answered differently, and where the best rollout and the best that earned less first differ."""
        if len(self.members) < 2:
            return ""
        different = sum(member.same_as is None for member in self.members)
        if different == 1:
            return f"All {len(self.members)} rollouts gave the same answers."
        best, *others = self.members
        others = [one for one in others if one.same_as != best.listed.trajectory.rollout_id]
        other = next((one for one in others if one.listed.reward != best.listed.reward), others[0])
        return (
            f"{different} of the {len(self.members)} rollouts gave answers of their own. The best rollout and "
            f"{other.listed.trajectory.rollout_id} first differ {_first_difference(best, other)}."
        )


def _first_difference(best: Member, other: Member) -> str:
    """The answers of `other` are split where they differ from those of `best`."""
    for place, (mine, theirs) in enumerate(zip(best.answers, other.answers, strict=False), 1):
        if mine.role != theirs.role:
            return f"in who answers: call {place} is of {mine.role}, and of {theirs.role}"
        rest = mine.rest[len(theirs.common) :]
        if rest or theirs.rest:
            after = f"after {_quoted(theirs.common[-_QUOTED:])}" if theirs.common else "at its beginning"
            return (
                f"in call {place}, of {mine.role}, {after}: the best goes on with {_quoted(rest[:_QUOTED])}, the other "
                f"with {_quoted(theirs.rest[:_QUOTED])}"
            )
    return f"in how many calls they make: {len(best.answers)}, and {len(other.answers)}"


def _quoted(text: str) -> str:
    return f"“{text}”" if text else "nothing"


@dataclass(frozen=True, slots=True)
class GroupPage:
    groups: list[Group]
    cursor: str | None


def list_groups(store: Store, run: str, cursor: str | None) -> GroupPage:
    """The next groups whose first rollout is of `run`, or any if it is empty; as many as half a second finds."""
    deadline, found = time.monotonic() + _SEARCH_S, list[Group]()
    while True:
        page = store.list_rollouts(_PAGE, cursor)
        found += _groups_that_begin_with(store, page.rollout_ids, run)
        cursor = page.cursor
        if cursor is None or len(found) >= _GROUPS or time.monotonic() > deadline:
            return GroupPage(found, cursor)


def _groups_that_begin_with(store: Store, rollout_ids: Sequence[str], run: str) -> Iterator[Group]:
    """The groups of which one of these is the first rollout that has spans: so each group is in one page."""
    known = store.get_rollouts(rollout_ids)
    for rollout_id in rollout_ids:
        rollout = known.get(rollout_id)
        if rollout is None or rollout.group_id is None or (run and rollout.metadata.get("run") != run):
            continue
        queued = (one.rollout_id for one in store.query_rollouts(rollout.group_id))
        if rollout_id == next((name for name in queued if name == rollout_id or store.query_rows(name)), None):
            yield Group.of(store, rollout.group_id)


def _members(listed: Sequence[ListedRollout]) -> list[Member]:
    """The rollouts with their answers, each compared with that of the same place in the first rollout, the best."""
    said = [list(_answers(one)) for one in listed]
    members, seen = [], dict[tuple[tuple[str, str], ...], str]()
    for one, answers in zip(listed, said, strict=True):
        shown = []
        for place, (role, text) in enumerate(answers):
            of_best = said[0][place] if len(said[0]) > place and answers is not said[0] else ("", "")
            common = len(commonprefix([text, of_best[1]])) if of_best[0] == role else 0  # noqa: RUF071 - texts, no paths
            shown.append(Answer(role, text[:common], text[common:]))
        trained = (report for report in one.reports if report.trained and report.trained[-1].advantage is not None)
        advantages = {r.call.role: r.trained[-1].advantage or 0.0 for r in trained}
        same_as = seen.get(tuple(answers))
        seen.setdefault(tuple(answers), one.trajectory.rollout_id)
        members.append(Member(one, shown, advantages, same_as))
    return members


def _answers(listed: ListedRollout) -> Iterator[tuple[str, str]]:
    """Role and text of each answer of the last attempt."""
    spans = {span.span_id: span for span in listed.spans}
    for call in listed.trajectory.calls:
        if call.attempt_id in (None, listed.trajectory.attempt_id):
            answer = read_conversation(call, spans).answer
            yield call.role, text_of(answer) if answer else call.error or ""
