"""The store's contract: the queue of rollouts, their attempts, and waiting for them."""

import sqlite3
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agl.errors import StoreError, TransitionError, UnknownIdError
from agl.store import Attempt, AttemptState, Rollout, RolloutState, Store, open_store
from tests.store.spans import make_span


def begin(store: Store, rollout_id: str, **limits: Any) -> str:
    """Queue and lease a rollout; returns the id of its attempt."""
    store.enqueue_rollouts([Rollout(rollout_id, "task", **limits)])
    return lease(store, rollout_id)


def lease(store: Store, rollout_id: str) -> str:
    leased = store.lease_rollout("worker", rollout_id)
    assert leased is not None
    return leased[1].attempt_id


def state_of(store: Store, rollout_id: str) -> RolloutState:
    rollout = store.get_rollout(rollout_id)
    assert rollout is not None
    return rollout.state


def attempt_states(store: Store, rollout_id: str) -> list[AttemptState]:
    return [attempt.state for attempt in store.query_attempts(rollout_id)]


def end_overdue(store: Store, in_s: float = 0) -> list[Attempt]:
    """`end_overdue_attempts` as of `in_s` seconds from now."""
    return store.end_overdue_attempts(time.time_ns() + int(in_s * 1e9))


def test_rollouts_are_leased_in_order_with_all_their_fields(store: Store) -> None:
    first = Rollout(
        "r1",
        {"question": "q", "n": [1, None]},
        group_id="g",
        mode="eval",
        max_attempts=3,
        retry_on=frozenset({AttemptState.TIMEOUT}),
        timeout_s=1.5,
        unresponsive_s=0.25,
        metadata={"seed": 7},
    )
    store.enqueue_rollouts([first, Rollout("r2", "text")])
    assert store.get_rollout("r1") == first
    leased = store.lease_rollout("worker-1")
    assert leased is not None
    rollout, attempt = leased
    assert rollout == store.get_rollout("r1") == replace(first, state=RolloutState.RUNNING, attempts=1)
    assert (attempt.attempt_id, attempt.number, attempt.worker_id) == ("r1-a1", 1, "worker-1")
    assert attempt.state is AttemptState.RUNNING
    assert abs(attempt.started_ns - time.time_ns()) < 60e9 and attempt.heartbeat_ns >= attempt.started_ns
    assert store.query_attempts("r1") == [attempt]
    second = store.lease_rollout("worker-1")
    assert second is not None and second[0].rollout_id == "r2"
    assert store.lease_rollout("worker-1") is None


def test_a_rollout_can_be_leased_by_id_before_earlier_ones(store: Store) -> None:
    store.enqueue_rollouts([Rollout("theirs", 1), Rollout("ours", 2)])
    leased = store.lease_rollout("worker", "ours")
    assert leased is not None and leased[1].attempt_id == "ours-a1"
    assert store.lease_rollout("worker", "ours") is None
    assert store.lease_rollout("worker", "unknown") is None
    theirs = store.get_rollout("theirs")
    assert theirs is not None and theirs.state is RolloutState.QUEUED


def test_a_rollout_is_leased_for_the_run_that_its_metadata_name(store: Store) -> None:
    odd = {"note": "NUL \0, its escape \\u0000, and \\"}
    runs = {"r1": odd, "r2": odd | {"run": "a"}, "r3": odd | {"run": "b", "seed": 7}, "r4": {"run": "b"}}
    store.enqueue_rollouts([Rollout(name, 1, metadata=metadata) for name, metadata in runs.items()])
    assert store.lease_rollout("worker", "r2", run="b") is None
    leased = [store.lease_rollout("worker", run=run) for run in ("b", "b", "b", "a", None)]
    assert [pair and pair[0].rollout_id for pair in leased] == ["r3", "r4", None, "r2", "r1"]


def test_an_attempt_that_is_given_back_does_not_count(store: Store) -> None:
    begin(store, "r1", max_attempts=2, retry_on=frozenset({AttemptState.TIMEOUT}))
    assert store.finish_attempt("r1-a1", AttemptState.RELEASED).state is RolloutState.QUEUED
    assert lease(store, "r1") == "r1-a2"
    assert store.finish_attempt("r1-a2", AttemptState.TIMEOUT).state is RolloutState.QUEUED
    assert lease(store, "r1") == "r1-a3"
    assert store.finish_attempt("r1-a3", AttemptState.TIMEOUT).state is RolloutState.FAILED
    assert attempt_states(store, "r1") == [AttemptState.RELEASED, AttemptState.TIMEOUT, AttemptState.TIMEOUT]


def test_enqueueing_again_changes_nothing(store: Store) -> None:
    store.enqueue_rollouts([Rollout("r1", "first", group_id="g")])
    store.lease_rollout("worker")
    store.enqueue_rollouts([Rollout("r1", "second", group_id="g"), Rollout("r2", "new", group_id="g")])
    assert [(r.rollout_id, r.input, r.state) for r in store.query_rollouts("g")] == [
        ("r1", "first", RolloutState.RUNNING),
        ("r2", "new", RolloutState.QUEUED),
    ]


def test_an_input_that_is_not_json_is_rejected_with_its_rollout_id(store: Store) -> None:
    with pytest.raises(StoreError, match="input of rollout r1"):
        store.enqueue_rollouts([Rollout("r1", object())])


def test_many_rollouts_are_found_at_once(store: Store) -> None:
    store.enqueue_rollouts([Rollout(name, name) for name in "abc"])
    found = store.get_rollouts(["c", "unknown", "a", "c"])
    assert {name: rollout.input for name, rollout in found.items()} == {"a": "a", "c": "c"}
    assert found["a"] == store.get_rollout("a")
    assert (store.get_rollouts([]), store.get_rollout("unknown")) == ({}, None)


def test_a_finished_attempt_ends_its_rollout(store: Store) -> None:
    store.enqueue_rollouts([Rollout("good", 1), Rollout("bad", 2)])
    store.lease_rollout("worker")
    store.lease_rollout("worker")
    assert store.finish_attempt("good-a1", AttemptState.SUCCEEDED).state is RolloutState.SUCCEEDED
    assert store.finish_attempt("bad-a1", AttemptState.FAILED, "ValueError: x").state is RolloutState.FAILED
    (attempt,) = store.query_attempts("bad")
    assert (attempt.state, attempt.error) == (AttemptState.FAILED, "ValueError: x")
    assert attempt.ended_ns is not None and attempt.ended_ns >= attempt.started_ns
    rollout = store.get_rollout("good")
    assert rollout is not None and rollout.state is RolloutState.SUCCEEDED
    assert rollout.ended_ns is not None and rollout.ended_ns >= attempt.started_ns


def test_a_failed_attempt_is_retried_while_attempts_are_left(store: Store) -> None:
    store.enqueue_rollouts([Rollout("r1", 1, max_attempts=2), Rollout("r2", 2)])
    store.lease_rollout("worker")
    assert store.finish_attempt("r1-a1", AttemptState.FAILED).state is RolloutState.QUEUED
    again = store.lease_rollout("worker")  # It keeps its position before r2.
    assert again is not None and again[1].attempt_id == "r1-a2"
    assert store.finish_attempt("r1-a2", AttemptState.FAILED).state is RolloutState.FAILED


def test_an_attempt_that_ended_cannot_end_again(store: Store) -> None:
    store.enqueue_rollouts([Rollout("r1", 1)])
    store.lease_rollout("worker")
    store.finish_attempt("r1-a1", AttemptState.SUCCEEDED)
    with pytest.raises(TransitionError, match="attempt r1-a1 is succeeded and cannot become failed"):
        store.finish_attempt("r1-a1", AttemptState.FAILED)
    assert store.heartbeat(["r1-a1"]) == ["r1-a1"]
    assert attempt_states(store, "r1") == [AttemptState.SUCCEEDED]


@pytest.mark.parametrize("state", [AttemptState.RUNNING, AttemptState.UNRESPONSIVE, AttemptState.CANCELLED])
def test_a_worker_can_report_only_the_allowed_ends(store: Store, state: AttemptState) -> None:
    attempt_id = begin(store, "r1")
    with pytest.raises(TransitionError, match=f"attempt r1-a1 cannot be finished as {state}"):
        store.finish_attempt(attempt_id, state)
    assert state_of(store, "r1") is RolloutState.RUNNING


def test_unknown_ids_are_named(store: Store) -> None:
    with pytest.raises(UnknownIdError, match="no attempt 'x-a1'"):
        store.finish_attempt("x-a1", AttemptState.SUCCEEDED)
    with pytest.raises(UnknownIdError, match="no attempt 'x-a1'"):
        store.heartbeat(["x-a1"])
    with pytest.raises(UnknownIdError, match="no rollout 'x'"):
        store.cancel_rollouts(["x"])
    with pytest.raises(UnknownIdError, match="no rollout 'x'"):
        store.wait_for_rollouts(["x"], timeout_s=0)
    assert store.get_rollout("x") is None
    assert store.query_attempts("x") == []
    assert store.query_rollouts("x") == []


def test_cancelled_rollouts_are_not_leased_and_stay_cancelled(store: Store) -> None:
    store.enqueue_rollouts([Rollout("done", 1), Rollout("running", 2), Rollout("queued", 3)])
    store.lease_rollout("worker")
    store.lease_rollout("worker")
    store.finish_attempt("done-a1", AttemptState.SUCCEEDED)
    store.cancel_rollouts(["done", "running", "queued"])
    assert store.lease_rollout("worker") is None
    assert attempt_states(store, "running") == [AttemptState.CANCELLED]
    assert store.heartbeat(["running-a1"]) == ["running-a1"]  # Tells the worker to stop.
    assert store.finish_attempt("running-a1", AttemptState.SUCCEEDED).state is RolloutState.CANCELLED
    done = store.get_rollout("done")
    assert done is not None and done.state is RolloutState.SUCCEEDED


def test_each_rollout_is_leased_once_by_many_workers(store: Store) -> None:
    store.enqueue_rollouts([Rollout(f"r{number}", number) for number in range(40)])
    leased: list[str] = []

    def work(worker: str) -> None:
        while (lease := store.lease_rollout(worker)) is not None:
            leased.append(lease[0].rollout_id)

    threads = [threading.Thread(target=work, args=(f"w{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(leased) == sorted(f"r{number}" for number in range(40))


def test_states_are_counted(store: Store) -> None:
    assert store.count_rollouts() == dict.fromkeys(RolloutState, 0)
    begin(store, "running")
    store.finish_attempt(begin(store, "failed"), AttemptState.FAILED)
    store.enqueue_rollouts([Rollout("r1", 1), Rollout("r2", 2)])
    assert store.count_rollouts() == dict.fromkeys(RolloutState, 0) | {
        RolloutState.RUNNING: 1,
        RolloutState.FAILED: 1,
        RolloutState.QUEUED: 2,
    }


# --- Retries and the watchdog ----------------------------------------------------------------------------------------


def test_only_the_ends_in_retry_on_are_retried(store: Store) -> None:
    on_timeout = {"max_attempts": 3, "retry_on": frozenset({AttemptState.TIMEOUT})}
    attempt_id = begin(store, "r1", **on_timeout)
    assert store.finish_attempt(attempt_id, AttemptState.TIMEOUT).state is RolloutState.QUEUED
    assert store.finish_attempt(lease(store, "r1"), AttemptState.FAILED).state is RolloutState.FAILED
    assert attempt_states(store, "r1") == [AttemptState.TIMEOUT, AttemptState.FAILED]


def test_an_attempt_over_its_timeout_is_ended_even_if_it_sends_heartbeats(store: Store) -> None:
    attempt_id = begin(store, "r1", timeout_s=10)
    begin(store, "unlimited")
    store.heartbeat([attempt_id])
    assert end_overdue(store, in_s=9) == []
    (ended,) = end_overdue(store, in_s=11)
    assert (ended.attempt_id, ended.state, ended.error) == ("r1-a1", AttemptState.TIMEOUT, "not ended within 10 s")
    assert store.query_attempts("r1") == [ended]
    assert state_of(store, "r1") is RolloutState.FAILED
    assert end_overdue(store, in_s=1e6) == []
    assert state_of(store, "unlimited") is RolloutState.RUNNING


def test_a_silent_attempt_is_unresponsive_and_its_rollout_is_retried(store: Store) -> None:
    begin(store, "silent", unresponsive_s=10, max_attempts=2)
    assert end_overdue(store, in_s=9) == []
    (ended,) = end_overdue(store, in_s=11)
    assert (ended.state, ended.error) == (AttemptState.UNRESPONSIVE, "no span and no heartbeat for 10 s")
    assert state_of(store, "silent") is RolloutState.QUEUED
    lease(store, "silent")
    assert len(end_overdue(store, in_s=11)) == 1
    assert state_of(store, "silent") is RolloutState.FAILED


@pytest.mark.parametrize("sign", ["heartbeat", "span", "agentlightning"])
def test_heartbeats_and_spans_keep_an_attempt_alive(store: Store, sign: str) -> None:
    attempt_id = begin(store, "r1", unresponsive_s=10)
    (before,) = store.query_attempts("r1")
    time.sleep(0.15)
    send_sign(store, attempt_id, sign)
    (after,) = store.query_attempts("r1")
    assert 0.1e9 < after.heartbeat_ns - before.heartbeat_ns < 60e9
    assert end_overdue(store, in_s=9) == []


def send_sign(store: Store, attempt_id: str, sign: str) -> None:
    if sign == "heartbeat":
        assert store.heartbeat([attempt_id]) == []
    elif sign == "span":  # The heartbeat has the time of arrival, not the start time of the span.
        store.append_spans([make_span(1, rollout="r1", attempt=attempt_id, start_ns=7)])
    else:
        store.append_spans([make_span(1, **{"agentlightning.attempt_id": attempt_id})])


@pytest.mark.parametrize("sign", ["heartbeat", "span"])
def test_a_heartbeat_or_span_revives_an_unresponsive_attempt_that_was_not_replaced(store: Store, sign: str) -> None:
    attempt_id = begin(store, "r1", unresponsive_s=10, max_attempts=2)
    end_overdue(store, in_s=11)
    send_sign(store, attempt_id, sign)
    assert (state_of(store, "r1"), attempt_states(store, "r1")) == (RolloutState.RUNNING, [AttemptState.RUNNING])
    assert store.lease_rollout("other") is None
    assert store.finish_attempt(attempt_id, AttemptState.SUCCEEDED).state is RolloutState.SUCCEEDED


def test_an_unresponsive_attempt_may_still_finish_before_the_next_attempt_begins(store: Store) -> None:
    attempt_id = begin(store, "r1", unresponsive_s=10, max_attempts=2)
    end_overdue(store, in_s=11)
    assert store.finish_attempt(attempt_id, AttemptState.SUCCEEDED).state is RolloutState.SUCCEEDED
    assert store.lease_rollout("other") is None


@pytest.mark.parametrize("sign", ["heartbeat", "span"])
def test_an_unresponsive_attempt_that_was_replaced_never_runs_again(store: Store, sign: str) -> None:
    first = begin(store, "r1", unresponsive_s=10, max_attempts=3)
    end_overdue(store, in_s=11)
    second = lease(store, "r1")
    if sign == "heartbeat":
        assert store.heartbeat([first, second]) == [first]
    else:
        send_sign(store, first, sign)
        assert store.count_spans() == 1
    with pytest.raises(TransitionError, match="attempt r1-a1 is unresponsive and cannot become succeeded"):
        store.finish_attempt(first, AttemptState.SUCCEEDED)
    store.finish_attempt(second, AttemptState.FAILED)  # Queued again, but the first attempt is not the last one.
    assert store.heartbeat([first]) == [first]
    assert attempt_states(store, "r1") == [AttemptState.UNRESPONSIVE, AttemptState.FAILED]


@pytest.mark.parametrize("sign", ["heartbeat", "span"])
def test_a_rollout_that_ended_never_runs_again(store: Store, sign: str) -> None:
    attempt_id = begin(store, "r1", unresponsive_s=10)
    end_overdue(store, in_s=11)
    if sign == "heartbeat":
        assert store.heartbeat([attempt_id]) == [attempt_id]
    else:
        send_sign(store, attempt_id, sign)
    assert (state_of(store, "r1"), attempt_states(store, "r1")) == (RolloutState.FAILED, [AttemptState.UNRESPONSIVE])


def test_a_queued_rollout_is_cancelled_with_the_attempt_that_went_silent(store: Store) -> None:
    begin(store, "r1", unresponsive_s=10, max_attempts=2)
    end_overdue(store, in_s=11)
    store.cancel_rollouts(["r1"])
    assert (state_of(store, "r1"), attempt_states(store, "r1")) == (RolloutState.CANCELLED, [AttemptState.CANCELLED])


def test_spans_that_arrive_after_the_end_belong_to_the_rollout(store: Store) -> None:
    attempt_id = begin(store, "r1")
    store.append_spans([make_span(1, rollout="r1", attempt=attempt_id)])
    store.finish_attempt(attempt_id, AttemptState.SUCCEEDED)
    store.append_spans([make_span(2, rollout="r1", attempt=attempt_id), make_span(3)])
    assert [span.name for span in store.query_spans("r1")] == ["span 1", "span 2", "span 3"]
    assert state_of(store, "r1") is RolloutState.SUCCEEDED


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_attempts": 0}, "may have 0 attempts"),
        ({"timeout_s": 0.0}, "timeout_s 0"),
        ({"unresponsive_s": -1.0}, "unresponsive_s -1"),
        ({"retry_on": frozenset({AttemptState.SUCCEEDED})}, "retries on"),
    ],
)
def test_invalid_limits_are_rejected_with_the_rollout_id(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(StoreError, match=f"rollout r1 .*{message}"):
        Rollout("r1", 1, **limits)


# --- Waiting ---------------------------------------------------------------------------------------------------------


def test_waiting_ends_with_the_last_of_the_rollouts(store: Store) -> None:
    attempts = [begin(store, name, group_id="g") for name in ("r1", "r2")]
    found: list[list[Rollout]] = []
    waiter = threading.Thread(target=lambda: found.append(store.wait_for_group("g", timeout_s=30)))
    waiter.start()
    store.finish_attempt(attempts[1], AttemptState.SUCCEEDED)
    waiter.join(0.2)
    assert waiter.is_alive()
    store.finish_attempt(attempts[0], AttemptState.FAILED)
    waiter.join(5)
    assert [[rollout.state for rollout in rollouts] for rollouts in found] == [
        [RolloutState.FAILED, RolloutState.SUCCEEDED]
    ]


def test_cancelling_and_the_watchdog_end_a_wait(store: Store) -> None:
    begin(store, "late", timeout_s=1)
    store.enqueue_rollouts([Rollout("cancelled", 1)])
    found: list[Rollout] = []
    names = ["late", "cancelled"]
    waiter = threading.Thread(target=lambda: found.extend(store.wait_for_rollouts(names, timeout_s=30)))
    waiter.start()
    store.cancel_rollouts(["cancelled"])
    end_overdue(store, in_s=2)
    waiter.join(5)
    assert [rollout.state for rollout in found] == [RolloutState.FAILED, RolloutState.CANCELLED]


def test_waiting_gives_up_when_the_time_is_up(store: Store) -> None:
    begin(store, "r1")
    began = time.monotonic()
    assert [rollout.state for rollout in store.wait_for_rollouts(["r1"], timeout_s=0.2)] == [RolloutState.RUNNING]
    assert 0.2 <= time.monotonic() - began < 5
    assert store.wait_for_rollouts([]) == []


@pytest.mark.parametrize(("unresponsive_s", "saved"), [(1000.0, 1), (0.1, 2), (None, 1)])
def test_spans_of_an_attempt_save_a_heartbeat_in_a_tenth_of_its_time(
    store: Store, unresponsive_s: float | None, saved: int
) -> None:
    """With a thousand attempts at once, a heartbeat for each span would cost more than the spans."""
    attempt_id, seen = begin(store, "r1", unresponsive_s=unresponsive_s), set[int]()
    time.sleep(0.15)  # The lease was a heartbeat.
    for number in (1, 2):
        store.append_spans([make_span(number, rollout="r1", attempt=attempt_id)])
        seen.add(store.query_attempts("r1")[0].heartbeat_ns)
        time.sleep(0.15)
    assert len(seen) == saved


def test_a_span_whose_batch_failed_is_a_heartbeat_when_it_is_sent_again(tmp_path: Path) -> None:
    with closing(open_store(f"sqlite:///{tmp_path}/agl.db")) as store:
        attempt_id = begin(store, "r1", unresponsive_s=1000)
        (before,) = store.query_attempts("r1")
        time.sleep(0.15)
        with sqlite3.connect(tmp_path / "agl.db") as other:
            other.execute("CREATE TRIGGER full BEFORE INSERT ON spans BEGIN SELECT RAISE(FAIL, 'full'); END")
        with pytest.raises(StoreError):
            store.append_spans([make_span(1, rollout="r1", attempt=attempt_id)])
        with sqlite3.connect(tmp_path / "agl.db") as other:
            other.execute("DROP TRIGGER full")
        store.append_spans([make_span(1, rollout="r1", attempt=attempt_id)])
        (after,) = store.query_attempts("r1")
        assert after.heartbeat_ns > before.heartbeat_ns
