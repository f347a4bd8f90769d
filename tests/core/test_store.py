"""The store contract, run on every backend, and what only a file can show."""

import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agl import semconv
from agl.errors import AglError, StoreError
from agl.span import Span, SpanEvent
from agl.store import AttemptState, Resource, Rollout, RolloutState, Store, open_store

TRACE = "0af7651916cd43dd8448eb211c80319c"
OTHER_TRACE = "1bf7651916cd43dd8448eb211c80319c"


@pytest.fixture(params=["sqlite", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    uri = "memory://" if request.param == "memory" else f"sqlite:///{tmp_path}/agl.db"
    opened = open_store(uri)
    yield opened
    opened.close()


def make_span(number: int, *, trace: str = TRACE, rollout: str | None = None, start_ns: int = 0, **more: Any) -> Span:
    attributes = {semconv.ROLLOUT_ID: rollout} if rollout else {}
    return Span(trace, f"{number:016x}", None, f"span {number}", start_ns, start_ns + 1, attributes, **more)


# --- Spans -----------------------------------------------------------------------------------------------------------


def test_a_span_comes_back_as_it_was(store: Store) -> None:
    span = Span(
        trace_id=TRACE,
        span_id="b7ad6b7169203331",
        parent_id="00f067aa0ba902b7",
        name="agl.gateway.call",
        start_ns=1_795_000_000_000_000_001,
        end_ns=1_795_000_000_000_000_002,
        attributes={
            "text": "naïve \x00 \N{SNOWMAN}",
            "yes": True,
            "whole": 1,
            "real": 1.0,
            "bytes": bytes(range(256)),
            "texts": ["a", ""],
            "flags": [True, False],
            "wholes": [1, -(2**63)],
            "reals": [1.0, math.inf],
            "none": [],
        },
        status="error",
        status_message="boom",
        kind=3,
        events=(SpanEvent("exception", 5, {"exception.type": "ValueError"}),),
        resource={"service.name": "agent"},
        scope="agl.gateway",
    )
    assert store.append_spans([span]) == 1
    (found,) = store.query_spans(TRACE)
    assert found == span
    assert [type(value) for value in found.attributes.values()] == [type(v) for v in span.attributes.values()]
    reals = found.attributes["reals"]
    assert isinstance(reals, list) and [type(item) for item in reals] == [float, float]


def test_a_span_sent_twice_is_kept_once_and_as_first_sent(store: Store) -> None:
    assert store.append_spans([make_span(1), make_span(2)]) == 2
    assert store.append_spans([make_span(2, start_ns=99), make_span(3), make_span(3)]) == 1
    assert store.count_spans() == 3
    assert [span.start_ns for span in store.query_spans(TRACE)] == [0, 0, 0]


def test_the_same_span_id_in_another_trace_is_another_span(store: Store) -> None:
    assert store.append_spans([make_span(1), make_span(1, trace=OTHER_TRACE)]) == 2


def test_no_spans_are_no_change(store: Store) -> None:
    assert store.append_spans([]) == 0
    assert store.count_spans() == 0


def test_query_finds_named_spans_and_the_unnamed_of_their_traces_by_start(store: Store) -> None:
    store.append_spans(
        [
            make_span(1, rollout="r1", start_ns=30),
            make_span(2, start_ns=20),  # The same trace, no rollout of its own.
            make_span(3, rollout="r2", start_ns=10),  # The same trace, another rollout.
            make_span(4, trace=OTHER_TRACE, rollout="r1", start_ns=5),  # Another trace of the rollout.
            make_span(5, trace=OTHER_TRACE, start_ns=1),
            make_span(6, trace="2" * 32, start_ns=0),  # Nothing to do with it.
        ]
    )
    assert [span.name for span in store.query_spans("r1")] == ["span 5", "span 4", "span 2", "span 1"]
    assert [span.name for span in store.query_spans("r2")] == ["span 3", "span 2"]
    assert [span.name for span in store.query_spans("2" * 32)] == ["span 6"]
    assert store.query_spans("unknown") == []


def test_last_rollout_prefers_the_last_that_is_named(store: Store) -> None:
    assert store.last_rollout_id() is None
    store.append_spans([make_span(1)])
    assert store.last_rollout_id() == TRACE
    store.append_spans([make_span(2, rollout="old", start_ns=50), make_span(3, rollout="new", start_ns=40)])
    store.append_spans([make_span(4, trace=OTHER_TRACE)])
    assert store.last_rollout_id() == "new"


def test_a_value_that_otlp_cannot_carry_is_refused_and_the_store_lives_on(store: Store) -> None:
    with pytest.raises(AglError, match="span 1"):
        store.append_spans([make_span(1), Span(TRACE, "2" * 16, None, "span 1", 0, 1, {"big": 2**70})])
    assert store.append_spans([make_span(1)]) == 1


def test_many_threads_append_at_once(store: Store) -> None:
    def append(worker: int) -> None:
        for number in range(20):
            store.append_spans([make_span(worker * 100 + number + 1)])

    threads = [threading.Thread(target=append, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.count_spans() == 160


# --- Rollouts --------------------------------------------------------------------------------------------------------


def test_rollouts_are_leased_in_order_and_carry_what_was_queued(store: Store) -> None:
    first = Rollout("r1", {"question": "q", "n": [1, None]}, group_id="g", mode="eval", metadata={"seed": 7})
    store.enqueue_rollouts([first, Rollout("r2", "text")])
    leased = store.lease_rollout("worker-1")
    assert leased is not None
    rollout, attempt = leased
    assert (rollout.rollout_id, rollout.input, rollout.mode, rollout.metadata) == (
        "r1",
        first.input,
        "eval",
        {"seed": 7},
    )
    assert rollout.state is RolloutState.RUNNING
    assert (attempt.attempt_id, attempt.number, attempt.worker_id) == ("r1-a1", 1, "worker-1")
    assert attempt.state is AttemptState.RUNNING
    assert store.query_attempts("r1") == [attempt]
    second = store.lease_rollout("worker-1")
    assert second is not None and second[0].rollout_id == "r2"
    assert store.lease_rollout("worker-1") is None


def test_a_named_rollout_is_leased_past_the_others_while_it_is_queued(store: Store) -> None:
    store.enqueue_rollouts([Rollout("theirs", 1), Rollout("ours", 2)])
    leased = store.lease_rollout("worker", "ours")
    assert leased is not None and leased[1].attempt_id == "ours-a1"
    assert store.lease_rollout("worker", "ours") is None
    assert store.lease_rollout("worker", "unknown") is None
    theirs = store.get_rollout("theirs")
    assert theirs is not None and theirs.state is RolloutState.QUEUED


def test_enqueueing_again_changes_nothing(store: Store) -> None:
    store.enqueue_rollouts([Rollout("r1", "first", group_id="g")])
    store.lease_rollout("worker")
    store.enqueue_rollouts([Rollout("r1", "second", group_id="g"), Rollout("r2", "new", group_id="g")])
    assert [(r.rollout_id, r.input, r.state) for r in store.query_rollouts("g")] == [
        ("r1", "first", RolloutState.RUNNING),
        ("r2", "new", RolloutState.QUEUED),
    ]


def test_an_input_that_is_not_json_is_refused_by_name(store: Store) -> None:
    with pytest.raises(StoreError, match="input of rollout r1"):
        store.enqueue_rollouts([Rollout("r1", object())])


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


def test_a_failed_attempt_is_tried_again_while_tries_are_left(store: Store) -> None:
    store.enqueue_rollouts([Rollout("r1", 1, max_attempts=2), Rollout("r2", 2)])
    store.lease_rollout("worker")
    assert store.finish_attempt("r1-a1", AttemptState.FAILED).state is RolloutState.QUEUED
    again = store.lease_rollout("worker")  # It keeps its place before r2.
    assert again is not None and again[1].attempt_id == "r1-a2"
    assert store.finish_attempt("r1-a2", AttemptState.FAILED).state is RolloutState.FAILED


def test_a_final_attempt_refuses_another_end(store: Store) -> None:
    store.enqueue_rollouts([Rollout("r1", 1)])
    store.lease_rollout("worker")
    store.finish_attempt("r1-a1", AttemptState.SUCCEEDED)
    with pytest.raises(StoreError, match="attempt r1-a1 is succeeded and cannot become failed"):
        store.finish_attempt("r1-a1", AttemptState.FAILED)
    with pytest.raises(StoreError, match="attempt r1-a1 is succeeded"):
        store.heartbeat("r1-a1")


def test_unknown_ids_are_named(store: Store) -> None:
    with pytest.raises(StoreError, match="no attempt 'x-a1'"):
        store.finish_attempt("x-a1", AttemptState.SUCCEEDED)
    with pytest.raises(StoreError, match="no attempt 'x-a1'"):
        store.heartbeat("x-a1")
    with pytest.raises(StoreError, match="no rollout 'x'"):
        store.cancel_rollouts(["x"])
    assert store.get_rollout("x") is None


def test_a_silent_attempt_times_out_and_a_live_one_does_not(store: Store) -> None:
    store.enqueue_rollouts([Rollout("silent", 1, max_attempts=2), Rollout("live", 2)])
    store.lease_rollout("worker")
    store.lease_rollout("worker")
    time.sleep(0.05)
    store.heartbeat("live-a1")
    assert store.requeue_stale(50_000_000) == ["silent-a1"]
    (attempt,) = store.query_attempts("silent")
    assert attempt.state is AttemptState.TIMEOUT
    assert attempt.error == "no heartbeat for 0.05 s"
    rollout = store.get_rollout("silent")
    assert rollout is not None and rollout.state is RolloutState.QUEUED
    assert store.requeue_stale(10**15) == []


def test_cancelled_rollouts_are_not_leased_and_stay_cancelled(store: Store) -> None:
    store.enqueue_rollouts([Rollout("done", 1), Rollout("running", 2), Rollout("queued", 3)])
    store.lease_rollout("worker")
    store.lease_rollout("worker")
    store.finish_attempt("done-a1", AttemptState.SUCCEEDED)
    store.cancel_rollouts(["done", "running", "queued"])
    assert store.lease_rollout("worker") is None
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


# --- Resources and metrics -------------------------------------------------------------------------------------------


def test_resources_have_versions_and_the_newest_is_the_default(store: Store) -> None:
    store.put_resource(Resource("writer", 0, "adapters/writer/0"))
    store.put_resource(Resource("writer", 1, "wrong"))
    store.put_resource(Resource("writer", 1, "adapters/writer/1", {"step": 1}))
    assert store.get_resource("writer") == Resource("writer", 1, "adapters/writer/1", {"step": 1})
    assert store.get_resource("writer", 0) == Resource("writer", 0, "adapters/writer/0")
    assert store.get_resource("writer", 2) is None
    assert store.get_resource("fixer") is None


def test_metrics_come_back_by_name_and_step(store: Store) -> None:
    store.append_metrics("run", 2, {"reward": 0.5, "loss": math.nan})
    store.append_metrics("run", 1, {"reward": 9})
    store.append_metrics("run", 1, {"reward": 0.25})
    store.append_metrics("other", 1, {"reward": -1})
    found = store.query_metrics("run")
    assert found["reward"] == [(1, 0.25), (2, 0.5)]
    assert found["loss"][0][0] == 2 and math.isnan(found["loss"][0][1])
    assert set(found) == {"reward", "loss"}


def test_a_closed_store_says_so(store: Store) -> None:
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.append_spans([make_span(1)])
    with pytest.raises(StoreError, match="closed"):
        store.count_spans()
    store.close()


# --- Files -----------------------------------------------------------------------------------------------------------


def test_every_memory_store_is_its_own() -> None:
    first, second = open_store("memory://"), open_store("memory://")
    first.append_spans([make_span(1)])
    assert second.count_spans() == 0
    first.close()
    second.close()


def test_a_store_is_found_again_and_commits_reach_the_disk(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/deep/agl.db"
    first = open_store(uri)
    first.append_spans([make_span(1, rollout="r")])
    first.close()
    second = open_store(uri)
    assert [span.name for span in second.query_spans("r")] == ["span 1"]
    second.close()


@pytest.mark.parametrize("content", [b"this is a text file, not a database" * 50, None])
def test_a_file_that_is_not_a_store_is_refused_and_left_alone(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "shop.db"
    if content is None:
        with sqlite3.connect(path) as other:
            other.execute("CREATE TABLE orders (id INTEGER)")
        other.close()
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"shop\.db"):
        open_store(f"sqlite:///{path}")
    assert path.read_bytes() == before


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/agl.db"
    open_store(uri).close()
    with sqlite3.connect(tmp_path / "agl.db") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(StoreError, match="schema version 99"):
        open_store(uri)


def test_uris_that_name_no_store_are_refused() -> None:
    with pytest.raises(StoreError, match="mysql"):
        open_store("mysql://host/db")
    with pytest.raises(StoreError, match="names no file"):
        open_store("sqlite:///")


WRITER = """
import sys
from agl.span import Span
from agl.store import open_store

store, first, last = open_store(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
for number in range(first, last):
    store.append_spans([Span("0af7651916cd43dd8448eb211c80319c", f"{number:016x}", None, "s", number, number)])
    print(number, flush=True)
"""


def start_writer(uri: str, first: int, last: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, uri, str(first), str(last)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_killed_while_writing_every_acknowledged_span_is_there_once(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/agl.db"
    writer = start_writer(uri, 1, 1_000_000)
    assert writer.stdout is not None
    acknowledged = [int(writer.stdout.readline()) for _ in range(50)]
    os.kill(writer.pid, signal.SIGKILL)
    acknowledged += [int(line) for line in writer.stdout if line.endswith("\n")]
    writer.wait()
    writer.stdout.close()
    store = open_store(uri)
    found = [int(span.span_id, 16) for span in store.query_spans(TRACE)]
    store.close()
    assert len(acknowledged) >= 50
    assert sorted(set(found)) == sorted(found)
    assert set(acknowledged) <= set(found)


def test_two_processes_and_a_reader_share_a_new_file(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/agl.db"
    writers = [start_writer(uri, 1, 101), start_writer(uri, 101, 201)]
    store = open_store(uri)
    assert [json.loads(f"[{','.join((w.communicate()[0]).split())}]") for w in writers] == [
        list(range(1, 101)),
        list(range(101, 201)),
    ]
    assert store.count_spans() == 200
    store.close()
