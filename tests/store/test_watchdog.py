"""The thread that ends overdue attempts, alone and in `agl serve`."""

import logging
import time
from contextlib import closing
from pathlib import Path

import pytest

from agl.errors import StoreError
from agl.store import Attempt, Rollout, RolloutState, Store, open_store
from agl.store.sqlite.store import SqliteStore
from agl.store.watchdog import watching
from tests.store.serving import serving


def lease(store: Store) -> None:
    store.enqueue_rollouts([Rollout("r1", 1, timeout_s=0.2)])
    assert store.lease_rollout("worker") is not None


class FailingTwiceStore(SqliteStore):
    """A store in memory whose first two looks for overdue attempts raise: a StoreError, then another error."""

    looks = 0

    def end_overdue_attempts(self, now_ns: int | None = None) -> list[Attempt]:
        self.looks += 1
        if self.looks == 1:
            raise StoreError("the disk is full")
        if self.looks == 2:
            raise ZeroDivisionError
        return super().end_overdue_attempts(now_ns)


def test_the_watchdog_survives_errors_and_logs_them_and_the_attempts_it_ended(caplog: pytest.LogCaptureFixture) -> None:
    with closing(FailingTwiceStore(":memory:", uri="memory://")) as store, caplog.at_level(logging.WARNING):
        lease(store)
        with watching(store, every_s=0.05):
            (rollout,) = store.wait_for_rollouts(["r1"], timeout_s=10)
        looks = store.looks
        time.sleep(0.2)
        assert store.looks == looks
    assert rollout.state is RolloutState.FAILED
    assert "could not look at memory://: the disk is full" in caplog.text
    assert "could not look at memory://, which is a defect of agl" in caplog.text and "ZeroDivisionError" in caplog.text
    assert "attempt r1-a1 is timeout: not ended within 0.2 s" in caplog.text


def test_agl_serve_watches_its_store(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/agl.db"
    with serving(uri), closing(open_store(uri)) as store:
        lease(store)
        (rollout,) = store.wait_for_rollouts(["r1"], timeout_s=15)
    assert rollout.state is RolloutState.FAILED
