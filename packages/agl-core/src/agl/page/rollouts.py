"""The list of rollouts, and one rollout with its tree, timeline, texts and tokens."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Self
from urllib.parse import urlencode

from agl.errors import UnknownIdError
from agl.inspection.listing import ListedRollout, Selection, read_listed, reward_filter
from agl.inspection.report import CallReport, format_tokens
from agl.inspection.rollout import InspectedRollout
from agl.inspection.transcript import Said
from agl.inspection.tree import LastSiblings
from agl.page.tokens import TokenView, view_tokens
from agl.span import Span
from agl.store import Rollout, Store
from agl.trajectory import ADVICE
from agl.trajectory.attributes import agent_of
from agl.trajectory.call import error_of

PAGE_ROLLOUTS: Final = 25
_SEARCH_S: Final = 0.5
"""A request searches for this long; the next one continues."""
_MAX_SPANS: Final = 400
_MAX_CHARS: Final = 12_000
_TIMELINE: Final = 1000
_MIN_WIDTH: Final = 3.0
_NAMES: Final = ("run", "mode", "role", "reward", "version", "outcome", "error", "text")


@dataclass(frozen=True, slots=True)
class Filters:
    """The filters of the list as the person wrote them."""

    values: Mapping[str, str]

    @classmethod
    def of(cls, query: Mapping[str, str]) -> Self:
        return cls({name: query.get(name, "").strip() for name in _NAMES})

    def selection(self) -> Selection:
        """Raises InputError for a reward that is none."""
        given = {name: value for name, value in self.values.items() if value}
        reward = reward_filter(given["reward"]) if "reward" in given else None
        error = given.get("error")
        return Selection(
            run=given.get("run"),
            mode=given.get("mode"),
            role=given.get("role"),
            version=given.get("version"),
            outcome=given.get("outcome"),
            text=given.get("text"),
            reward=reward,
            error="" if error == "any" else error,
        )

    @property
    def is_empty(self) -> bool:
        return not any(self.values.values())

    def query(self, **more: str) -> str:
        """The filters as the query of a URL, with `more` in addition or in place of them."""
        return urlencode({name: value for name, value in {**self.values, **more}.items() if value}, errors="replace")


@dataclass(frozen=True, slots=True)
class ListPage:
    rollouts: list[ListedRollout]
    cursor: str | None
    """None: there are no more."""
    searched: int
    """Rollouts that were compared with the filters."""


def list_page(store: Store, filters: Filters, cursor: str | None) -> ListPage:
    """The next rollouts that pass the filters. Stops after `_SEARCH_S` with what it has found."""
    selection, deadline = filters.selection(), time.monotonic() + _SEARCH_S
    found: list[ListedRollout] = []
    searched = 0
    while True:
        page = store.list_rollouts(PAGE_ROLLOUTS, cursor)
        listed = read_listed(store, page.rollout_ids, selection.role).values()
        found += filter(selection.admits, listed)
        searched += len(listed)
        cursor = page.cursor
        if cursor is None or len(found) >= PAGE_ROLLOUTS or time.monotonic() > deadline:
            return ListPage(found, cursor, searched)


@dataclass(frozen=True, slots=True)
class ShownText:
    label: str
    text: str
    left_out: int
    """Characters that are not shown."""


@dataclass(frozen=True, slots=True)
class SpanRow:
    """A span in the tree and on the timeline."""

    span: Span
    branch: str
    role: str
    report: CallReport | None
    notes: list[str]
    error: str | None
    x: float
    width: float
    """On a line of `_TIMELINE` units."""
    texts: list[ShownText]

    @property
    def tokens(self) -> str:
        return format_tokens(self.report.call) if self.report else ""

    @property
    def outcome(self) -> str | None:
        return self.report.outcome if self.report else None

    @property
    def advice(self) -> str:
        """What the reason of the last step means and what to do, if no advice for the whole rollout has it."""
        report = self.report
        if report is None or not report.trained or report.sampling_fault:
            return ""
        return next((text for reason, text in ADVICE.items() if reason == report.outcome), "")


@dataclass(frozen=True, slots=True)
class RolloutView:
    """A rollout on its page."""

    inspected: InspectedRollout
    queued: Rollout | None
    rows: list[SpanRow]
    left_out: int
    """Spans that are not shown."""

    @classmethod
    def of(cls, store: Store, rollout_id: str, shows_all: bool) -> Self:
        """Raises UnknownIdError if the store has no span of it."""
        inspected = inspect(store, rollout_id)
        shown = inspected.walk if shows_all else inspected.walk[:_MAX_SPANS]
        rows = list(_rows(inspected, shown))
        return cls(inspected, store.get_rollout(rollout_id), rows, len(inspected.walk) - len(shown))

    @property
    def duration_ns(self) -> int:
        return max(span.end_ns for span in self._timed) - self.start_ns

    @property
    def start_ns(self) -> int:
        return min(span.start_ns for span in self._timed)

    @property
    def _timed(self) -> Sequence[Span]:
        """The spans of the run; of a rollout that sampling left out, its summary."""
        return self.inspected.tree.spans or self.inspected.spans

    @property
    def reward_parts(self) -> Mapping[str, float]:
        """Parts of the reward of the rollout as a whole."""
        whole = [
            reward for reward in self.inspected.trajectory.rewards if reward.target is None and reward.role is None
        ]
        return whole[-1].dimensions if whole else {}


def inspect(store: Store, rollout_id: str) -> InspectedRollout:
    spans = store.query_spans(rollout_id)
    if not spans:
        raise UnknownIdError(f"{store.uri} holds no span of rollout {rollout_id!r}")
    return InspectedRollout(spans)


def token_view(store: Store, rollout_id: str, call_id: str) -> TokenView:
    """The tokens of a call. Raises UnknownIdError if the rollout has no such call."""
    inspected = inspect(store, rollout_id)
    report = inspected.report_of.get(call_id)
    if report is None:
        raise UnknownIdError(f"rollout {rollout_id!r} has no model call {call_id!r}")
    queued = store.get_rollout(rollout_id)
    runs = [step.run for step in report.trained if step.run] + [queued.metadata.get("run") if queued else None]
    resources = (store.get_resource(f"run {run}") for run in reversed(runs) if isinstance(run, str))
    folder = next((resource.uri for resource in resources if resource), None)
    return view_tokens(report, inspected.trajectory.mode, folder)


def full_text(store: Store, rollout_id: str, span_id: str, number: int) -> str:
    """A text of a span in full. Raises UnknownIdError if there is none of this number."""
    inspected = inspect(store, rollout_id)
    for span, _ in inspected.walk:
        texts = inspected.transcript.new_texts(span)
        if span.span_id == span_id and number < len(texts):
            return texts[number].text
    raise UnknownIdError(f"rollout {rollout_id!r} has no text {number} of span {span_id!r}")


def _rows(inspected: InspectedRollout, shown: Sequence[tuple[Span, LastSiblings]]) -> Iterator[SpanRow]:
    spans = inspected.tree.spans
    first = min((span.start_ns for span in spans), default=0)
    scale = _TIMELINE / max(max((span.end_ns for span in spans), default=0) - first, 1)
    for span, lasts in shown:
        report = inspected.report_of.get(span.span_id)
        x = (span.start_ns - first) * scale
        yield SpanRow(
            span=span,
            branch=_branch(lasts),
            role=(report.call.role if report else agent_of(span)) or "",
            report=report,
            notes=[note for note in inspected.notes(span) if not note.startswith("error: ")],
            error=error_of(span) if span.status == "error" else None,
            x=min(x, _TIMELINE - _MIN_WIDTH),
            width=max((span.end_ns - span.start_ns) * scale, _MIN_WIDTH),
            texts=[_shown(said) for said in inspected.transcript.new_texts(span)],
        )


def _shown(said: Said) -> ShownText:
    return ShownText(said.label, said.text[:_MAX_CHARS], max(len(said.text) - _MAX_CHARS, 0))


def _branch(lasts: LastSiblings) -> str:
    if len(lasts) == 1:
        return ""
    return "".join("   " if last else "│  " for last in lasts[1:-1]) + ("└─ " if lasts[-1] else "├─ ")
