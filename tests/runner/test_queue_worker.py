"""A worker of the queue: whose rollouts it takes, how it ends them, what it gives back, and when it gives up."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import agl
from agl import semconv
from agl.errors import AglError, RefusedError, RunnerError
from agl.runner.agent import Agent
from agl.runner.queue_worker import QueueWorker
from agl.server.auth import BearerTokens
from agl.server_thread import ServerThread
from agl.store import AttemptState, Rollout, RolloutState, Store, open_store
from agl.store.http import client
from tests.core.otlp_sink import OtlpSink
from tests.ports import free_port
from tests.runner import agents
from tests.waiting import wait_until

Begin = Callable[..., "Working"]


class Working:
    """A worker in a thread of its own."""

    def __init__(self, store: Store, agent: Callable[[Any], Any], **options: Any) -> None:
        defaults = {"run": None, "concurrency": 8, "timeout_s": 30.0, "drain_s": 20.0, "patience_s": 0.0}
        self._agent = Agent(agent, None, {})
        self.worker = QueueWorker(store, self._agent, **(defaults | options))
        self.error: AglError | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            self.worker.work()
        except AglError as error:
            self.error = error

    def join(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()

    def stop(self) -> None:
        self.worker.stop()
        self.join()
        self._agent.close()


@pytest.fixture
def begin() -> Iterator[Begin]:
    """Starts workers; at the end it releases agents that hang."""
    started: list[Working] = []
    agents.release.clear()

    def start(*arguments: Any, **options: Any) -> Working:
        started.append(Working(*arguments, **options))
        return started[-1]

    yield start
    agents.release.set()
    for working in started:
        working.stop()


def state(store: Store, name: str) -> str:
    rollout = store.get_rollout(name)
    assert rollout is not None
    return rollout.state.value


def attempts(store: Store, name: str) -> list[tuple[str, str | None]]:
    return [(attempt.state.value, attempt.error) for attempt in store.query_attempts(name)]


def test_each_end_is_that_of_its_rollout_and_reported_once_its_spans_are_stored(store: Store, begin: Begin) -> None:
    limits: dict[str, Any] = {"max_attempts": 2, "retry_on": frozenset({AttemptState.TIMEOUT})}
    store.enqueue_rollouts([Rollout("other", 0, metadata={"run": "b"})])
    store.enqueue_rollouts(
        [
            Rollout("good", 2, metadata={"run": "a"}),
            Rollout("bad", "x", metadata={"run": "a"}, max_attempts=2),
            Rollout("late", 1, metadata={"run": "a"}, timeout_s=0.1, **limits),
        ]
    )
    begin(store, say_or_hang, run="a")
    names = ["good", "bad", "late"]
    ended = store.wait_for_rollouts(names, 60)
    assert [rollout.state for rollout in ended] == ["succeeded", "failed", "failed"]
    assert attempts(store, "good") == [("succeeded", None)]
    assert attempts(store, "bad") == [("failed", "ValueError: 'x' is no number")] * 2
    assert [state for state, _ in attempts(store, "late")] == ["timeout"] * 2
    assert state(store, "other") == "queued"
    spans = {span.name: span for span in store.query_spans("good")}  # No wait: the end is after them.
    assert set(spans) == {semconv.SPAN_ROLLOUT, semconv.SPAN_MESSAGE}
    (event,) = spans[semconv.SPAN_ROLLOUT].events
    assert (event.name, dict(event.attributes)) == (
        semconv.EVENT_LOG,
        {
            semconv.LOG_SOURCE: "an.agent",
            semconv.LOG_SEVERITY: "warning",
            semconv.LOG_BODY: "thinking about 2",
        },
    )


def say_or_hang(task: Any) -> int:
    if not isinstance(task, int):
        raise ValueError(f"{task!r} is no number")
    logging.getLogger("an.agent").warning("thinking about %s", task)
    agl.emit_message(f"saw {task}")
    return agents.hang_on_odd(task)


def test_a_worker_that_stops_lets_rollouts_end_and_gives_back_the_rest(store: Store, begin: Begin) -> None:
    started, finish = threading.Semaphore(0), threading.Event()

    def agent(task: int) -> None:
        started.release()
        (finish if task == 0 else agents.release).wait()

    store.enqueue_rollouts([Rollout(f"r{task}", task) for task in (0, 1, 2)])
    first = begin(store, agent, concurrency=2)
    assert started.acquire(timeout=60) and started.acquire(timeout=60)
    first.worker.stop()
    finish.set()
    wait_until(lambda: state(store, "r0") == "succeeded")
    first.worker.stop()  # The second call does not wait for the other one.
    first.join()
    assert [state(store, name) for name in ("r1", "r2")] == ["queued", "queued"]
    assert attempts(store, "r1") == [("released", None)]
    agents.release.set()
    begin(store, agents.double)
    assert [rollout.state for rollout in store.wait_for_rollouts(["r1", "r2"], 60)] == ["succeeded"] * 2


def test_a_rollout_that_another_ends_is_given_up(store: Store, begin: Begin) -> None:
    store.enqueue_rollouts([Rollout("r1", 1, unresponsive_s=0.3), Rollout("r2", 2)])
    begin(store, agents.hang_on_odd, concurrency=1)
    wait_until(lambda: state(store, "r1") == "running")
    store.cancel_rollouts(["r1"])
    assert store.wait_for_rollouts(["r2"], 60)[0].state is RolloutState.SUCCEEDED
    assert attempts(store, "r1") == [("cancelled", None)]


def test_a_rollout_whose_spans_are_lost_runs_again(store: Store, begin: Begin) -> None:
    runs: list[int] = []

    def agent(task: int) -> int:
        runs.append(task)
        if len(runs) == 1:
            lose_spans()
        return task

    store.enqueue_rollouts([Rollout("r1", 1)])
    begin(store, agent, patience_s=60.0)
    assert store.wait_for_rollouts(["r1"], 60)[0].state is RolloutState.SUCCEEDED
    assert [state for state, _ in attempts(store, "r1")] == ["released", "succeeded"]


def test_a_collector_that_is_slow_loses_no_spans_and_no_attempts(
    store: Store, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agl.runner.queue_worker.HEARTBEAT_S", 0.05)
    agl.shutdown()
    with OtlpSink() as slow:
        slow.hold.clear()
        agl.init(endpoint=slow.url)
        store.enqueue_rollouts([Rollout("r1", 1)])
        worker = begin(store, agents.double, patience_s=300.0)
        wait_until(lambda: bool(worker.worker._flushing))
        time.sleep(0.2)
        slow.hold.set()
        assert store.wait_for_rollouts(["r1"], 60)[0].state is RolloutState.SUCCEEDED
        agl.shutdown()
    assert [state for state, _ in attempts(store, "r1")] == ["succeeded"]


def lose_spans() -> None:
    from agl import tracing

    (collector,) = tracing._collectors.values()
    assert collector._exporter is not None
    collector._exporter.lost += 1


def test_a_worker_gives_up_when_store_or_collector_stay_away(
    store: Store, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_TRY_FOR_S", 0.0)
    away = begin(open_store(f"http://127.0.0.1:{free_port()}"), agents.double)
    away.join()
    assert isinstance(away.error, RunnerError) and away.error.exit_code == 2
    assert str(away.error).startswith("the store does not answer (http://127.0.0.1:")
    assert "Start it again when `agl serve` or the training runs" in str(away.error)
    agl.shutdown()
    store.enqueue_rollouts([Rollout("r1", 1)])
    deaf = begin(store, agents.double)
    deaf.join()
    assert isinstance(deaf.error, RunnerError) and "the collector did not take the spans of 1 rollout" in str(
        deaf.error
    )


def test_a_worker_without_the_right_token_ends_at_once(store: Store, begin: Begin) -> None:
    with ServerThread(store, port=0, otlp_http_port=0, tokens=BearerTokens(["secret"])) as server:
        refused = begin(open_store(server.base_url), agents.double, patience_s=300.0)
        refused.join()
    assert isinstance(refused.error, RefusedError) and "set AGL_TOKEN" in str(refused.error)
