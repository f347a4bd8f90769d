"""Groups that run ahead: taken as they end, carried over, waited for when they get old, cancelled at the end."""

import threading
import time
from collections.abc import Iterator, Sequence

import pytest

from agl.config import TrainConfig
from agl.errors import TrainingError
from agl.store import Rollout, RolloutState, Store, open_store
from agl_trainer.rollout.feed import Feed, Launched
from agl_trainer.rollout.rollouts import Ran
from agl_trainer.rollout.runner import Outcome
from agl_trainer.rollout.sources import Deck


class Gate:
    """Runs groups; each ends when it is let."""

    def __init__(self) -> None:
        self.doors: dict[str, threading.Event] = {}

    def launched(self, number: int, step: int) -> Launched:
        rollout = Rollout(f"r{number}", number)
        self.doors[rollout.rollout_id] = threading.Event()
        return Launched(number, step, [rollout])

    def run(self, rollouts: Sequence[Rollout]) -> Ran:
        (rollout,) = rollouts
        assert self.doors[rollout.rollout_id].wait(60)
        if rollout.input == 13:
            raise ValueError("unlucky")
        return Ran([Outcome(rollout.rollout_id, RolloutState.SUCCEEDED)])

    def let(self, *numbers: int) -> None:
        for number in numbers:
            self.doors[f"r{number}"].set()


@pytest.fixture
def store() -> Iterator[Store]:
    store = open_store("memory://")
    yield store
    store.close()


def numbers(groups: Sequence[Launched]) -> list[int]:
    return [group.number for group in groups]


def test_what_ends_first_is_taken_and_the_others_are_carried_over(store: Store) -> None:
    gate = Gate()
    with Feed(store, gate.run, max_lag=2, at_once=8) as feed:
        for number in range(4):
            feed.launch(gate.launched(number, step=0))
        gate.let(3, 1)
        assert numbers(feed.take(2, step=0)) == [1, 3]
        assert numbers(feed.launched) == [0, 2]
        feed.launch(gate.launched(4, step=0))
        gate.let(4, 0)
        assert numbers(feed.take(2, step=1)) == [0, 4]
        # The group of two steps ago comes first, though others have ended.
        feed.launch(gate.launched(5, step=1))
        gate.let(5)
        threading.Timer(0.05, lambda: gate.let(2)).start()
        assert numbers(feed.take(1, step=2)) == [2]
        assert numbers(feed.take(1, step=2)) == [5]
        with pytest.raises(TrainingError, match="step 3 takes 1 groups, but only 0 were launched"):
            feed.take(1, step=3)


def test_what_a_group_raises_reaches_the_step(store: Store) -> None:
    gate = Gate()
    with Feed(store, gate.run, max_lag=1, at_once=8) as feed:
        feed.launch(gate.launched(13, step=0))
        gate.let(13)
        with pytest.raises(ValueError, match="unlucky"):
            feed.take(1, step=0)


def test_what_still_runs_at_the_end_is_cancelled(store: Store) -> None:
    gate = Gate()
    with Feed(store, gate.run, max_lag=1, at_once=8) as feed:
        for number in range(3):
            feed.launch(gate.launched(number, step=0))
        gate.let(1)
        feed.take(1, step=0)
    states = [rollout.state for number in range(3) if (rollout := store.get_rollout(f"r{number}"))]
    assert states == [RolloutState.CANCELLED, RolloutState.QUEUED, RolloutState.CANCELLED]
    gate.let(0, 2)


def test_no_more_groups_run_at_once_than_may(store: Store) -> None:
    running, peaks, lock = set[int](), list[int](), threading.Lock()

    def run(rollouts: Sequence[Rollout]) -> Ran:
        number = rollouts[0].input
        with lock:
            running.add(number)
            peaks.append(len(running))
        time.sleep(0.01)
        with lock:
            running.discard(number)
        return Ran([])

    with Feed(store, run, max_lag=9, at_once=2) as feed:
        for number in range(6):
            feed.launch(Launched(number, 0, [Rollout(f"r{number}", number)]))
        assert numbers(feed.take(6, step=0)) == list(range(6))
    assert len(peaks) == 6 and max(peaks) <= 2


def test_every_epoch_deals_each_item_once_in_an_order_of_its_own() -> None:
    train = TrainConfig(model="tiny", seed=3)
    deck = Deck.of(list("abcdefgh"), train)
    epochs = [[deck.at(8 * epoch + place) for place in range(8)] for epoch in range(3)]
    assert all(sorted(epoch) == list("abcdefgh") for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [deck.at(place) for place in range(8)] == epochs[0]
    listed = Deck.of([1, 2, 3], TrainConfig(model="tiny", shuffle=False))
    assert [listed.at(place) for place in range(5)] == [1, 2, 3, 1, 2]
