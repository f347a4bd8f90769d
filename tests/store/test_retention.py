"""The store's contract: `gc` deletes whole rollouts that are over and old."""

import time
from typing import Any

from agl.span import Span
from agl.store import AttemptState, Collected, Rollout, Store
from agl.store.retention import IDLE_S
from tests.store.spans import OTHER_TRACE, TRACE, answered, asked, make_span, numbers

DAY_S = 86_400.0


def collect(store: Store, *, in_s: float, **limits: Any) -> Collected:
    """`gc` as of `in_s` seconds from now."""
    return store.gc(now_ns=time.time_ns() + int(in_s * 1e9), **limits)


def run(store: Store, rollout_id: str, spans: list[Span], state: AttemptState | None = AttemptState.SUCCEEDED) -> None:
    """A queued rollout with these spans, ended as `state`; None: it is still running."""
    store.enqueue_rollouts([Rollout(rollout_id, "task")])
    leased = store.lease_rollout("worker", rollout_id)
    assert leased is not None
    store.append_spans(spans)
    if state is not None:
        store.finish_attempt(leased[1].attempt_id, state)


def big_span(number: int, rollout: str) -> Span:
    return make_span(number, trace=f"{number:032x}", rollout=rollout, text="x" * 500_000)


def test_old_rollouts_are_deleted_with_their_attempts_and_all_their_spans(store: Store) -> None:
    run(store, "r1", [make_span(1, rollout="r1"), make_span(2), asked(3, "a", rollout="r1")])
    store.append_spans([answered(4, "a")])
    assert len(store.query_spans("r1")) == 4
    assert collect(store, in_s=DAY_S - 60, older_than_s=DAY_S) == Collected()
    assert collect(store, in_s=DAY_S + 60, older_than_s=DAY_S) == Collected(rollouts=1, spans=4)
    assert (store.count_spans(), store.query_spans("r1")) == (0, [])
    assert (store.get_rollout("r1"), store.query_attempts("r1")) == (None, [])
    assert collect(store, in_s=DAY_S + 60, older_than_s=DAY_S) == Collected()


def test_queued_and_running_rollouts_stay_however_old_they_are(store: Store) -> None:
    run(store, "running", [make_span(1, rollout="running")], state=None)
    store.enqueue_rollouts([Rollout("queued", 1)])
    run(store, "failed", [make_span(2, trace=OTHER_TRACE, rollout="failed")], AttemptState.FAILED)
    store.enqueue_rollouts([Rollout("cancelled", 1)])
    store.cancel_rollouts(["cancelled"])
    assert collect(store, in_s=9 * DAY_S, older_than_s=DAY_S, max_bytes=0) == Collected(rollouts=2, spans=1)
    assert numbers(store.query_spans("running")) == [1]
    assert [store.get_rollout(name) is None for name in ("running", "queued", "failed", "cancelled")] == [
        False,
        False,
        True,
        True,
    ]


def test_age_counts_from_the_arrival_of_the_last_span_not_from_its_start_time(store: Store) -> None:
    store.append_spans([make_span(1, rollout="r1", start_ns=5)])
    store.append_spans([make_span(2, trace=OTHER_TRACE, rollout="r2", start_ns=2**62)])
    assert collect(store, in_s=DAY_S - 60, older_than_s=DAY_S) == Collected()
    assert collect(store, in_s=DAY_S + 60, older_than_s=DAY_S) == Collected(rollouts=2, spans=2)


def test_a_rollout_that_was_never_queued_is_over_when_no_span_arrives(store: Store) -> None:
    store.append_spans([make_span(1, rollout="r1"), make_span(2, trace=OTHER_TRACE)])
    assert collect(store, in_s=IDLE_S - 60, older_than_s=1, max_bytes=0) == Collected()
    assert collect(store, in_s=IDLE_S + 60, older_than_s=1) == Collected(rollouts=2, spans=2)


def test_unnamed_spans_stay_with_the_last_of_the_rollouts_that_share_their_trace(store: Store) -> None:
    run(store, "done", [make_span(1, rollout="done"), make_span(2)])
    run(store, "running", [make_span(3, rollout="running")], state=None)
    assert collect(store, in_s=9 * DAY_S, older_than_s=DAY_S) == Collected(rollouts=1, spans=1)
    assert numbers(store.query_spans("running")) == [2, 3]
    store.finish_attempt("running-a1", AttemptState.SUCCEEDED)
    assert collect(store, in_s=9 * DAY_S, older_than_s=DAY_S) == Collected(rollouts=1, spans=2)


def test_rollouts_that_share_a_trace_are_deleted_together_with_all_spans(store: Store) -> None:
    run(store, "r1", [make_span(1, rollout="r1"), make_span(2)])
    run(store, "r2", [make_span(3, rollout="r2")])
    run(store, "other", [make_span(4, trace=OTHER_TRACE, rollout="other")])
    assert collect(store, in_s=9 * DAY_S, older_than_s=DAY_S) == Collected(rollouts=3, spans=4)
    assert store.count_spans() == 0


def test_joined_spans_that_arrived_before_those_of_their_rollout_are_deleted_with_it(store: Store) -> None:
    """The framework's trace names no rollout; the gateway call names one, and the response id joins the trace."""
    store.append_spans([asked(1, "a"), make_span(2)])
    run(store, "r1", [answered(3, "a", rollout="r1")], state=None)
    assert collect(store, in_s=9 * DAY_S, older_than_s=DAY_S) == Collected()
    store.finish_attempt("r1-a1", AttemptState.SUCCEEDED)
    assert collect(store, in_s=9 * DAY_S, older_than_s=DAY_S) == Collected(rollouts=1, spans=3)
    assert store.query_spans(TRACE) == []


def test_over_the_size_limit_the_oldest_rollouts_are_deleted_until_the_store_fits(store: Store) -> None:
    names = [f"r{number}" for number in range(10)]
    for number, name in enumerate(names):
        run(store, name, [big_span(number * 10 + 1, name)], None if name == "r1" else AttemptState.SUCCEEDED)
    assert store.gc(max_bytes=10**9) == Collected()
    collected = store.gc(max_bytes=2_750_000)
    left = [name for name in names if store.query_spans(name)]
    assert collected == Collected(rollouts=10 - len(left), spans=10 - len(left))
    assert left == ["r1", *names[11 - len(left) :]]
    assert 3 <= len(left) <= 6
    store.gc(max_bytes=0)
    assert [name for name in names if store.query_spans(name)] == ["r1"]


def test_late_spans_of_a_deleted_rollout_are_stored(store: Store) -> None:
    run(store, "r1", [make_span(1, rollout="r1")])
    collect(store, in_s=2 * DAY_S, older_than_s=DAY_S)
    store.append_spans([make_span(1, rollout="r1"), make_span(2, rollout="r1", attempt="r1-a1")])
    assert numbers(store.query_spans("r1")) == [1, 2]
