"""How events change rollouts and attempts: pure functions, tested with random sequences of events."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from agl.errors import TransitionError
from agl.store.lifecycle import Pair, begin, cancel, expire, finish, heartbeat
from agl.store.rollout import RETRYABLE, Attempt, Rollout
from agl.store.states import ATTEMPT_TRANSITIONS, ENDS, ROLLOUT_TRANSITIONS, AttemptState, RolloutState

EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["begin", "heartbeat", "finish", "expire", "cancel"]), st.integers(0, 2), st.sampled_from(ENDS)
    ),
    max_size=30,
)
ROLLOUTS = st.builds(
    Rollout,
    st.just("r"),
    st.none(),
    max_attempts=st.integers(1, 3),
    retry_on=st.frozensets(st.sampled_from(sorted(RETRYABLE))),
    timeout_s=st.sampled_from([None, 20.0]),
    unresponsive_s=st.sampled_from([None, 5.0]),
)


def apply(event: str, rollout: Rollout, attempt: Attempt | None, end: AttemptState, now_ns: int) -> Pair | None:
    """The rollout and attempt that a store would save; None if nothing changes."""
    if event == "begin":
        return begin(rollout, "worker", now_ns)
    if attempt is None:
        return None
    if event == "finish":
        return finish(rollout, attempt, end, None, now_ns)
    return heartbeat(rollout, attempt, now_ns) if event == "heartbeat" else expire(rollout, attempt, now_ns)


@given(ROLLOUTS, EVENTS)
def test_at_most_one_attempt_runs_and_a_rollout_that_ended_never_runs_again(rollout: Rollout, events: list) -> None:
    attempts: list[Attempt] = []
    limit = rollout.max_attempts
    for second, (event, which, end) in enumerate(events):
        attempt = attempts[which] if which < len(attempts) else None
        if event == "expire" and (attempt is None or attempt.state is not AttemptState.RUNNING):
            continue  # The watchdog examines running attempts only.
        before = rollout
        if event == "cancel":
            rollout, last = cancel(rollout, attempts[-1] if attempts else None, second * 10**9)
            attempts = [*attempts[:-1], last] if last else attempts
        else:
            try:
                changed = apply(event, rollout, attempt, end, second * 10**9)
            except TransitionError:
                continue
            if changed:
                rollout, attempt = changed
                attempts[attempt.number - 1 : attempt.number] = [attempt]
        check(before, rollout, attempts)
        if rollout.state is not RolloutState.CANCELLED:  # Then an attempt may end, and nothing of the rollout changes.
            released = sum(attempt.state is AttemptState.RELEASED for attempt in attempts)
            assert rollout.max_attempts == limit + released


def check(before: Rollout, rollout: Rollout, attempts: list[Attempt]) -> None:
    assert rollout.attempts == len(attempts) <= rollout.max_attempts
    running = [attempt for attempt in attempts if attempt.state is AttemptState.RUNNING]
    assert running == (attempts[-1:] if rollout.state is RolloutState.RUNNING else [])
    assert (rollout.ended_ns is not None) == rollout.state.is_over
    if before.state.is_over:
        assert rollout == before
    if rollout.state is RolloutState.SUCCEEDED:
        assert attempts[-1].state is AttemptState.SUCCEEDED
    for attempt in attempts:
        assert (attempt.ended_ns is None) == (attempt.state is AttemptState.RUNNING)


def test_every_state_is_in_the_transition_tables() -> None:
    assert set(ROLLOUT_TRANSITIONS) == set(RolloutState)
    assert set(ATTEMPT_TRANSITIONS) == set(AttemptState)
    assert [state for state in RolloutState if state.is_over] == ["succeeded", "failed", "cancelled"]


def test_heartbeat_times_never_decrease() -> None:
    rollout, attempt = begin(Rollout("r", None), "worker", 100)
    changed = heartbeat(rollout, replace(attempt, heartbeat_ns=200), 150)
    assert changed is not None and changed[1].heartbeat_ns == 200
