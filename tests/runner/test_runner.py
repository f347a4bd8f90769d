"""Agents that answer, raise, hang or exit, run for rollouts of a real store, with spans over real OTLP."""

import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import agl
from agl import semconv
from agl.cli.inspection import Inspection
from agl.errors import StoreError, TrainingError
from agl.runner import execution
from agl.runner.runner import Outcome, Runner
from agl.store import AttemptState, Rollout, RolloutState, Store, open_store
from agl.trajectory import build_trajectory
from tests.runner import agents

Make = Callable[..., Runner]

HANGING = ["hang_on_odd", "hang_async_on_odd", "hang_in_a_thread_on_odd", "block_the_loop_on_odd"]


@pytest.fixture
def make(store: Store) -> Iterator[Make]:
    """Makes runners on the store; at the end it releases agents that hang."""
    made: list[Runner] = []
    agents.release.clear()

    def make_runner(agent: Callable[[Any], Any], **options: Any) -> Runner:
        made.append(Runner(store, agent, **options))
        return made[-1]

    yield make_runner
    agents.release.set()
    for runner in made:
        runner.close()
    for thread in threading.enumerate():
        if thread.name.startswith("agl r"):
            thread.join(5)


def rollouts(*tasks: Any, prefix: str = "r", **fields: Any) -> list[Rollout]:
    return [Rollout(f"{prefix}{task}", task, group_id="g", **fields) for task in tasks]


def states(outcomes: list[Outcome]) -> list[str]:
    return [outcome.state.value for outcome in outcomes]


def test_run_returns_with_answers_rewards_and_spans_stored(store: Store, make: Make) -> None:
    runner = make(agents.double, reward=agents.closeness, reward_weights={"goal": 0.8, "speed": 0.2})
    outcomes = runner.run(rollouts(3, 4, mode="eval"))
    assert outcomes == [
        Outcome("r3", RolloutState.SUCCEEDED, None, 6, pytest.approx(0.9), {"goal": 1.0, "speed": 0.5}),
        Outcome("r4", RolloutState.SUCCEEDED, None, 8, pytest.approx(0.9), {"goal": 1.0, "speed": 0.5}),
    ]
    spans = {span.name: span for span in store.query_spans("r3")}
    assert set(spans) == {semconv.SPAN_ROLLOUT, semconv.SPAN_MESSAGE, semconv.SPAN_REWARD}
    for span in spans.values():
        ids = (span.text(semconv.ROLLOUT_ID), span.text(semconv.ATTEMPT_ID), span.text(semconv.GROUP_ID))
        assert (*ids, span.text(semconv.MODE)) == ("r3", "r3-a1", "g", "eval")
    assert spans[semconv.SPAN_MESSAGE].role == "writer"
    reward = spans[semconv.SPAN_REWARD]
    assert reward.parent_id == spans[semconv.SPAN_ROLLOUT].span_id
    parts = [reward.number(semconv.REWARD_PREFIX + name) for name in ("value", "goal", "speed")]
    assert parts == [pytest.approx(0.9), 1.0, 0.5]
    assert [attempt.state for attempt in store.query_attempts("r3")] == [AttemptState.SUCCEEDED]


def test_async_agents_and_rewards_run_concurrently(store: Store, make: Make) -> None:
    outcomes = make(agents.double_async, reward=agents.judge, concurrency=16).run(rollouts(*range(40)))
    assert [(outcome.answer, outcome.reward, outcome.parts) for outcome in outcomes] == [
        (2 * task, 2 * task / 10, {}) for task in range(40)
    ]
    for task in (0, 39):
        message = next(span for span in store.query_spans(f"r{task}") if span.name == semconv.SPAN_MESSAGE)
        assert (message.text(semconv.MESSAGE_BODY), message.role) == (f"doubling {task}", "writer")


def test_an_agent_keeps_its_event_loop_from_run_to_run(make: Make) -> None:
    runner = make(agents.which_loop)
    answers = [outcome.answer for tasks in ((1, 2), (3, 4)) for outcome in runner.run(rollouts(*tasks))]
    assert len(set(answers)) == 1


def test_an_agent_that_raises_makes_a_failed_rollout(store: Store, make: Make) -> None:
    outcomes = make(agents.raise_on_odd).run(rollouts(1, 2))
    assert outcomes[0] == Outcome("r1", RolloutState.FAILED, "ValueError: 1 is odd")
    assert states(outcomes) == ["failed", "succeeded"]
    (attempt,) = store.query_attempts("r1")
    assert (attempt.state, attempt.error) == (AttemptState.FAILED, "ValueError: 1 is odd")
    (span,) = store.query_spans("r1")
    assert (span.status, span.attributes[semconv.ERROR_TYPE]) == ("error", "ValueError")
    assert "raise_on_odd" in str(span.events[0].attributes["exception.stacktrace"])


def test_an_agent_that_exits_does_not_end_the_runner(make: Make) -> None:
    outcomes = make(agents.leave_on_odd, concurrency=1).run(rollouts(1, 2))
    assert states(outcomes) == ["failed", "succeeded"]
    assert outcomes[0].error is not None and "SystemExit (3)" in outcomes[0].error


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda task, answer: answer / 0, "ZeroDivisionError"),
        (lambda task, answer: None, "the scorer returned None"),
        (lambda task, answer: {"goal": None}, "parts are missing: goal"),
        (lambda task, answer: sys.exit(3), "SystemExit: 3"),
        (lambda task, answer: {"goal": float("nan")}, "reward dimension 'goal' is nan"),
        (lambda task, answer: {"style": 1.0}, "reward dimension style has no weight"),
    ],
)
def test_a_reward_function_that_fails_makes_a_missing_reward_and_says_why(
    store: Store, make: Make, score: Callable[[Any, Any], Any], message: str
) -> None:
    (outcome,) = make(agents.double, reward=score, reward_weights={"goal": 1.0}).run(rollouts(1))
    assert (outcome.state, outcome.error, outcome.answer) == (RolloutState.SUCCEEDED, None, 2)
    assert (outcome.reward, outcome.parts) == (None, {})
    assert outcome.missing is not None and message in outcome.missing
    spans = store.query_spans("r1")
    assert [span.text(semconv.REWARD_MISSING) for span in spans if span.name == semconv.SPAN_REWARD] == [
        outcome.missing
    ]
    trajectory = build_trajectory(spans)
    assert (trajectory.error, trajectory.rewards) == (None, [])
    assert f"reward missing: {outcome.missing}" in Inspection(spans).text()


@pytest.mark.parametrize("score", [lambda task, answer: agents.release.wait(), agents.judge_forever])
def test_a_reward_function_that_hangs_makes_a_missing_reward(store: Store, make: Make, score: Any) -> None:
    outcomes = make(agents.double, reward=score, timeout_s=1.0, concurrency=2).run(rollouts(1, 2))
    assert [(one.state, one.reward, one.missing) for one in outcomes] == [
        (RolloutState.SUCCEEDED, None, "no reward within 1 s")
    ] * 2
    assert [attempt.state for attempt in store.query_attempts("r1")] == [AttemptState.SUCCEEDED]
    # Whoever reads the spans of another runner finds it too.
    assert build_trajectory(store.query_spans("r1")).missing_reward == "no reward within 1 s"


def test_the_answer_is_recorded_for_later_scorers(store: Store, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    make(lambda task: {"sql": "SELECT 1", "n": task}).run(rollouts(1))
    monkeypatch.setenv("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT", "false")
    make(agents.double).run(rollouts(2))
    answers = [
        span.text(semconv.ROLLOUT_ANSWER)
        for name in ("r1", "r2")
        for span in store.query_spans(name)
        if span.name == semconv.SPAN_ROLLOUT
    ]
    assert answers == ['{"sql":"SELECT 1","n":1}', None]


@pytest.mark.parametrize("agent", [getattr(agents, name) for name in HANGING])
def test_agents_that_never_answer_cost_only_their_timeout(store: Store, make: Make, agent: Any) -> None:
    """Four agents that hang, at concurrency 2, would block the runner forever."""
    outcomes = make(agent, concurrency=2).run([*rollouts(1, 3, 5, 7, timeout_s=0.3), *rollouts(2, 4)])
    assert states(outcomes) == ["failed"] * 4 + ["succeeded"] * 2
    assert outcomes[0].error == "no answer within 0.3 s"
    assert [attempt.state for attempt in store.query_attempts("r7")] == [AttemptState.TIMEOUT]


def test_a_late_answer_changes_nothing(store: Store, make: Make) -> None:
    runner = make(agents.hang_on_odd, reward=agents.closeness, timeout_s=0.1)
    (outcome,) = runner.run(rollouts(1))
    agents.release.set()
    next(thread for thread in threading.enumerate() if thread.name == "agl r1-a1").join(5)
    assert agl.flush()
    assert outcome.state is RolloutState.FAILED and outcome.answer is None
    assert {span.name for span in store.query_spans("r1")} == {semconv.SPAN_ROLLOUT, semconv.SPAN_MESSAGE}


def test_a_failed_attempt_is_tried_again(store: Store, make: Make) -> None:
    tries: dict[int, int] = {}

    def fail_first(task: int) -> int:
        tries[task] = tries.get(task, 0) + 1
        if tries[task] == 1:
            raise OSError("busy")
        return task

    outcomes = make(fail_first, concurrency=1).run([*rollouts(1, max_attempts=2), *rollouts(2)])
    assert states(outcomes) == ["succeeded", "failed"]
    assert outcomes[0].error is None
    assert [attempt.state.value for attempt in store.query_attempts("r1")] == ["failed", "succeeded"]
    assert {span.text(semconv.ATTEMPT_ID) for span in store.query_spans("r1")} == {"r1-a1", "r1-a2"}


def test_with_concurrency_one_rollouts_run_in_the_order_given(make: Make) -> None:
    seen: list[int] = []
    ended: list[str] = []
    runner = make(lambda task: seen.append(task), concurrency=1)
    outcomes = runner.run(rollouts(5, 1, 4, 2, 3), on_done=lambda outcome: ended.append(outcome.rollout_id))
    assert seen == [5, 1, 4, 2, 3]
    assert ended == [outcome.rollout_id for outcome in outcomes] == ["r5", "r1", "r4", "r2", "r3"]


def test_at_most_concurrency_rollouts_run_at_a_time(make: Make) -> None:
    lock, running, most = threading.Lock(), [0], [0]

    def agent(task: int) -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.01)
        with lock:
            running[0] -= 1

    make(agent, concurrency=3).run(rollouts(*range(12)))
    assert most == [3]


def test_rollouts_that_others_queued_in_the_store_are_not_run(store: Store, make: Make) -> None:
    store.enqueue_rollouts(rollouts(9, prefix="other"))
    assert states(make(agents.double).run(rollouts(1))) == ["succeeded"]
    left = store.get_rollout("other9")
    assert left is not None and left.state is RolloutState.QUEUED


def test_a_rollout_that_has_ended_is_not_run_again(make: Make) -> None:
    make(agents.raise_on_odd).run(rollouts(1, 2))
    again = make(agents.hang_on_odd).run(rollouts(1, 2, 4))
    assert again[0] == Outcome("r1", RolloutState.FAILED, "ValueError: 1 is odd")
    assert [outcome.answer for outcome in again] == [None, None, 4]


def test_a_rollout_that_another_runner_holds_is_refused(store: Store, make: Make) -> None:
    store.enqueue_rollouts(rollouts(1))
    store.lease_rollout("elsewhere-17", "r1")
    with pytest.raises(StoreError, match="rollout r1 is held by runner elsewhere-17"):
        make(agents.double).run(rollouts(1, 2))
    held, other = store.get_rollout("r1"), store.get_rollout("r2")
    assert held is not None and other is not None
    assert (held.state, other.state) == (RolloutState.RUNNING, RolloutState.CANCELLED)


def test_the_error_names_a_rollout_whose_task_is_not_json(make: Make) -> None:
    with pytest.raises(StoreError, match="rollout bad is not a JSON value"):
        make(agents.double).run([Rollout("bad", object())])


def test_a_rollout_whose_spans_are_lost_is_cancelled(store: Store, make: Make) -> None:
    agl.shutdown()
    with pytest.raises(TrainingError, match="spans of 1 answered rollouts did not reach the collector"):
        make(agents.double).run(rollouts(1))
    rollout = store.get_rollout("r1")
    assert rollout is not None and rollout.state is RolloutState.CANCELLED


def test_a_long_rollout_keeps_its_heartbeat(store: Store, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "HEARTBEAT_S", 0.05)
    make(lambda task: time.sleep(0.5)).run(rollouts(1))
    (attempt,) = store.query_attempts("r1")
    assert attempt.heartbeat_ns - attempt.started_ns > 0.3e9


def test_a_rollout_that_another_process_cancels_is_given_up(
    store: Store, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "HEARTBEAT_S", 0.05)
    timer = threading.Timer(0.2, store.cancel_rollouts, (["r1", "r2"],))
    timer.start()
    outcomes = make(agents.hang_on_odd).run(rollouts(1, 2, 4))
    timer.join()
    # The second had answered, but is marked as succeeded only at the end, once its spans are stored.
    assert states(outcomes) == ["cancelled", "cancelled", "succeeded"]
    assert [attempt.state.value for attempt in store.query_attempts("r1")] == ["cancelled"]


def test_a_rollout_that_the_watchdog_ends_is_tried_again(
    store: Store, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "HEARTBEAT_S", 0.05)
    outcomes = make(hang_first([])).run(rollouts(1, max_attempts=2, timeout_s=0.3))
    assert states(outcomes) == ["succeeded"]
    assert [attempt.state.value for attempt in store.query_attempts("r1")] == ["timeout", "succeeded"]


def hang_first(tries: list[int]) -> Callable[[int], int]:
    def agent(task: int) -> int:
        tries.append(task)
        if len(tries) == 1:
            agents.release.wait()
        return task

    return agent


def test_ctrl_c_keeps_answered_rollouts_and_cancels_the_rest(store: Store, make: Make) -> None:
    def interrupt(outcome: Outcome) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        make(agents.hang_on_odd, concurrency=2).run(rollouts(1, 2, 4), on_done=interrupt)
    found = [store.get_rollout(name) for name in ("r1", "r2", "r4")]
    assert [rollout.state.value for rollout in found if rollout] == ["cancelled", "succeeded", "cancelled"]


RUN_HANGING = """
import sys
from agl.store import Rollout, open_store
from agl.runner.runner import Runner
from tests.runner import agents

store = open_store(sys.argv[1])
agent = getattr(agents, sys.argv[2])
with Runner(store, agent) as runner:
    print("running", flush=True)
    runner.run([Rollout("r1", 1), Rollout("r3", 3)])
"""


@pytest.mark.parametrize("agent", HANGING)
def test_ctrl_c_ends_a_process_whose_agents_hang(tmp_path: Path, agent: str) -> None:
    uri = f"sqlite:///{tmp_path / 'hung.db'}"
    command = [sys.executable, "-c", RUN_HANGING, uri, agent]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=10)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGINT
    assert errors.strip().endswith("KeyboardInterrupt")
    store = open_store(uri)
    found = [store.get_rollout(name) for name in ("r1", "r3")]
    store.close()
    assert [rollout.state.value for rollout in found if rollout] == ["cancelled", "cancelled"]


def test_a_failure_is_logged_with_its_attempt(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        make(agents.raise_on_odd).run(rollouts(1))
    assert "attempt r1-a1: failed: ValueError: 1 is odd" in caplog.text
