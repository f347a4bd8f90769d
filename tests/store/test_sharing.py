"""The store's contract: the same store opened by several threads and processes, again, and after a kill."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing

import pytest

from agl.store import AttemptState, Resource, Rollout, RolloutState, open_store
from tests.store.spans import TRACE, make_span, numbers

WRITER = """
import sys
from agl.store import open_store
from tests.store.spans import make_span

store, first, last = open_store(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
for number in range(first, last):
    new = store.append_spans([make_span(number, rollout="r", start_ns=number)])
    print(number if new else -number, flush=True)
"""

WORKER = """
import sys
from agl.store import AttemptState, open_store

store = open_store(sys.argv[1])
while (leased := store.lease_rollout(sys.argv[2])) is not None:
    store.heartbeat([leased[1].attempt_id])
    store.finish_attempt(leased[1].attempt_id, AttemptState.SUCCEEDED)
    print(leased[0].rollout_id, flush=True)
"""


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def lines_of(*processes: subprocess.Popen[str]) -> list[list[str]]:
    """The words that each process printed, after all have exited with 0."""
    printed = [process.communicate(timeout=60)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    return printed


def test_a_store_that_is_opened_again_has_everything(shared_uri: str) -> None:
    rollout = Rollout("r", {"n": 1}, group_id="g", max_attempts=2, timeout_s=5.0)
    with closing(open_store(shared_uri)) as store:
        store.append_spans([make_span(1, rollout="r")])
        store.enqueue_rollouts([rollout, Rollout("waiting", 2)])
        leased = store.lease_rollout("worker")
        store.put_resource(Resource("writer", 0, "adapters/0", {"a": 1}))
        store.put_resource(Resource("writer", 1, "adapters/1"))
        store.lease_resource("writer", "engine", 60, 0)
        store.append_metrics("run", 1, {"loss": 0.5})
    with closing(open_store(shared_uri)) as store:
        assert [span.name for span in store.query_spans("r")] == ["span 1"]
        assert leased is not None
        assert (store.get_rollout("r"), store.query_attempts("r")) == (leased[0], [leased[1]])
        assert store.finish_attempt("r-a1", AttemptState.FAILED).state is RolloutState.QUEUED
        assert store.get_resource("writer", 0) == Resource("writer", 0, "adapters/0", {"a": 1})
        assert store.collect_resources("writer") == []
        assert store.query_metrics("run") == {"loss": [(1, 0.5)]}
        assert store.append_spans([make_span(1, rollout="r")]) == 0


def test_killed_while_writing_every_acknowledged_span_is_there_once(shared_uri: str) -> None:
    writer = start(WRITER, shared_uri, 1, 1_000_000)
    assert writer.stdout is not None
    acknowledged = [int(writer.stdout.readline()) for _ in range(50)]
    os.kill(writer.pid, signal.SIGKILL)
    acknowledged += [int(line) for line in writer.stdout if line.endswith("\n")]
    writer.wait()
    writer.stdout.close()
    with closing(open_store(shared_uri)) as store:
        found = [int(span.span_id, 16) for span in store.query_spans("r")]
    assert len(acknowledged) >= 50
    assert len(set(found)) == len(found)
    assert set(acknowledged) <= set(found)


def test_processes_that_write_the_same_spans_leave_each_once_while_others_read(shared_uri: str) -> None:
    """The store is new: the processes also create it at the same time."""
    writers = [start(WRITER, shared_uri, 1, 101), start(WRITER, shared_uri, 51, 151)]
    seen: list[int] = []
    with closing(open_store(shared_uri)) as store:
        while any(writer.poll() is None for writer in writers):
            seen.append(len(store.query_spans("r")))
            time.sleep(0.01)
        printed = [[int(line) for line in lines] for lines in lines_of(*writers)]
        assert numbers(store.query_spans("r")) == list(range(1, 151))
        assert store.count_spans() == 150
    assert seen == sorted(seen)  # No span disappears.
    assert [list(map(abs, lines)) for lines in printed] == [list(range(1, 101)), list(range(51, 151))]
    new = [number for lines in printed for number in lines if number > 0]
    assert set(new) == set(range(1, 151))  # Each was new to one of them,
    assert len(new) == 150 or shared_uri.startswith("cassandra:")  # and not to both, where a store has transactions.


def test_each_rollout_is_leased_by_one_process(shared_uri: str) -> None:
    names = [f"r{number}" for number in range(40)]
    with closing(open_store(shared_uri)) as store:
        store.enqueue_rollouts([Rollout(name, None, group_id="g") for name in names])
        workers = [start(WORKER, shared_uri, worker) for worker in ("a", "b")]
        ended = store.wait_for_group("g", timeout_s=60)
        assert [rollout.state for rollout in ended] == [RolloutState.SUCCEEDED] * 40
        first, second = lines_of(*workers)
        assert sorted(first + second) == sorted(names)
        assert {len(store.query_attempts(name)) for name in names} == {1}


def test_an_end_in_one_store_ends_a_wait_in_another(shared_uri: str) -> None:
    with closing(open_store(shared_uri)) as here, closing(open_store(shared_uri)) as there:
        here.enqueue_rollouts([Rollout("r", 1)])
        assert there.lease_rollout("worker") is not None
        timer = threading.Timer(0.3, there.finish_attempt, ("r-a1", AttemptState.SUCCEEDED))
        timer.start()
        (rollout,) = here.wait_for_rollouts(["r"], timeout_s=30)
        timer.join()
    assert rollout.state is RolloutState.SUCCEEDED
    assert rollout.ended_ns is not None and time.time_ns() - rollout.ended_ns < 2e9


@pytest.mark.parametrize("verb", ["append", "enqueue", "finish"])
def test_a_change_in_one_store_is_visible_in_another_at_once(shared_uri: str, verb: str) -> None:
    with closing(open_store(shared_uri)) as here, closing(open_store(shared_uri)) as there:
        for number in range(1, 6):
            if verb == "append":
                here.append_spans([make_span(number)])
                assert there.count_spans() == len(there.query_spans(TRACE)) == number
                continue
            here.enqueue_rollouts([Rollout(f"r{number}", json.dumps(number))])
            leased = there.lease_rollout("worker")
            assert leased is not None and leased[0].rollout_id == f"r{number}"
            if verb == "finish":
                there.finish_attempt(leased[1].attempt_id, AttemptState.SUCCEEDED)
                found = here.get_rollout(f"r{number}")
                assert found is not None and found.state is RolloutState.SUCCEEDED
