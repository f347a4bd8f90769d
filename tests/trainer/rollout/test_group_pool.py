"""Groups that run ahead: taken as they end, left for a later step, waited for when old, cancelled at the end."""

import threading
import time
from collections.abc import Iterator, Sequence

import pytest

from agl.config import TrainConfig
from agl.errors import TrainingError
from agl.runner.runner import Outcome
from agl.store import Rollout, RolloutState, Store, open_store
from agl_trainer.rollout.group_pool import GroupPool, GroupRun
from agl_trainer.rollout.sources import TaskStream


class Gate:
    """Runs groups; each ends once its gate is opened."""

    def __init__(self) -> None:
        self.doors: dict[str, threading.Event] = {}

    def group(self, number: int, step: int) -> GroupRun:
        rollout = Rollout(f"r{number}", number)
        self.doors[rollout.rollout_id] = threading.Event()
        return GroupRun(number, step, [rollout])

    def run(self, rollouts: Sequence[Rollout]) -> list[Outcome]:
        (rollout,) = rollouts
        assert self.doors[rollout.rollout_id].wait(60)
        if rollout.input == 13:
            raise ValueError("unlucky")
        return [Outcome(rollout.rollout_id, RolloutState.SUCCEEDED)]

    def open(self, *numbers: int) -> None:
        for number in numbers:
            self.doors[f"r{number}"].set()


@pytest.fixture
def store() -> Iterator[Store]:
    store = open_store("memory://")
    yield store
    store.close()


def numbers(groups: Sequence[GroupRun]) -> list[int]:
    return [group.number for group in groups]


def test_groups_that_end_first_are_taken_and_the_rest_left_for_a_later_step(store: Store) -> None:
    gate = Gate()
    with GroupPool(store, gate.run, max_lag=2, concurrency=8) as pool:
        for number in range(4):
            pool.launch(gate.group(number, step=0))
        gate.open(3, 1)
        assert numbers(pool.take(2, step=0)) == [1, 3]
        assert numbers(pool.pending) == [0, 2]
        pool.launch(gate.group(4, step=0))
        gate.open(4, 0)
        assert numbers(pool.take(2, step=1)) == [0, 4]
        # The group launched two steps ago is waited for, although a newer one has ended.
        pool.launch(gate.group(5, step=1))
        gate.open(5)
        threading.Timer(0.05, lambda: gate.open(2)).start()
        assert numbers(pool.take(1, step=2)) == [2]
        assert numbers(pool.take(1, step=2)) == [5]
        with pytest.raises(TrainingError, match="step 3 takes 1 groups, but only 0 were launched"):
            pool.take(1, step=3)


def test_an_error_in_a_group_is_raised_in_the_step(store: Store) -> None:
    gate = Gate()
    with GroupPool(store, gate.run, max_lag=1, concurrency=8) as pool:
        pool.launch(gate.group(13, step=0))
        gate.open(13)
        with pytest.raises(ValueError, match="unlucky"):
            pool.take(1, step=0)


def test_groups_that_still_run_at_the_end_are_cancelled(store: Store) -> None:
    gate = Gate()
    with GroupPool(store, gate.run, max_lag=1, concurrency=8) as pool:
        for number in range(3):
            pool.launch(gate.group(number, step=0))
        gate.open(1)
        pool.take(1, step=0)
    states = [rollout.state for number in range(3) if (rollout := store.get_rollout(f"r{number}"))]
    assert states == [RolloutState.CANCELLED, RolloutState.QUEUED, RolloutState.CANCELLED]
    gate.open(0, 2)


def test_at_most_concurrency_groups_run_at_a_time(store: Store) -> None:
    running, peaks, lock = set[int](), list[int](), threading.Lock()

    def run(rollouts: Sequence[Rollout]) -> list[Outcome]:
        number = rollouts[0].input
        with lock:
            running.add(number)
            peaks.append(len(running))
        time.sleep(0.01)
        with lock:
            running.discard(number)
        return []

    with GroupPool(store, run, max_lag=9, concurrency=2) as pool:
        for number in range(6):
            pool.launch(GroupRun(number, 0, [Rollout(f"r{number}", number)]))
        assert numbers(pool.take(6, step=0)) == list(range(6))
    assert len(peaks) == 6 and max(peaks) <= 2


def test_every_epoch_yields_each_item_once_in_its_own_order() -> None:
    train = TrainConfig(model="tiny", seed=3)
    stream = TaskStream.of(list("abcdefgh"), train)
    epochs = [[stream.at(8 * epoch + place) for place in range(8)] for epoch in range(3)]
    assert all(sorted(epoch) == list("abcdefgh") for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [stream.at(place) for place in range(8)] == epochs[0]
    listed = TaskStream.of([1, 2, 3], TrainConfig(model="tiny", shuffle=False))
    assert [listed.at(place) for place in range(5)] == [1, 2, 3, 1, 2]
