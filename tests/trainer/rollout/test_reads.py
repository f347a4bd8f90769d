"""Whoever reads many rollouts asks the store for a hundred at a time, not for each alone."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agl import semconv
from agl.canary.history import Canary
from agl.canary.observation import observe
from agl.cli import main
from agl.config import CanaryConfig, TracesConfig
from agl.store import Rollout, Store, open_store
from agl.trajectory import DropReason, build_trajectory
from agl_trainer.algo.batch import CallOutcome
from agl_trainer.loop.call_log import CallLog
from agl_trainer.rollout.traces import read_traces
from tests.core.span_maker import gateway_call, reward
from tests.counted_reads import counted_reads

NAMES = [f"r{number}" for number in range(150)]
CANARY = Canary(id="c", candidate={}, current={}, shares=[], settings=CanaryConfig())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    store = open_store(f"sqlite:///{tmp_path_factory.mktemp('reads')}/agl.db")
    for number, name in enumerate(NAMES, 1):
        named = {semconv.ROLLOUT_ID: name, semconv.MODE: "train"}
        call = gateway_call(role="writer", attributes=named, trace_id=f"{number:032x}")
        store.append_spans([call, reward(0.5, named | {f"{semconv.REWARD_PREFIX}goal": 0.5}, parent=call)])
    store.enqueue_rollouts([Rollout(name, "task") for name in NAMES])
    yield store
    store.close()


def late_calls(store: Store) -> None:
    call_log = CallLog(store, "run")
    call_log.record(1, [], NAMES)
    assert len(call_log.late_calls()) == 150


def late_rewards(store: Store) -> None:
    found = store.query_spans_by_rollout(NAMES[:120])
    calls = [build_trajectory(spans).calls[0] for spans in found.values()]
    call_log = CallLog(store, "run")
    call_log.record(1, [CallOutcome(call, None, DropReason.NO_REWARD) for call in calls])
    call_log.warn_of_late_rewards()


@pytest.mark.parametrize(
    ("read", "sizes"),
    [
        (lambda store: observe(store, CANARY), [100, 50]),
        (lambda store: list(read_traces(store, TracesConfig())), [100, 50]),
        (late_calls, [100, 50]),
        (late_rewards, [120, 100, 20]),
    ],
    ids=["canary", "traces", "late calls", "late rewards"],
)
def test_many_rollouts_are_read_a_hundred_at_a_time(
    store: Store, read: Callable[[Store], object], sizes: list[int]
) -> None:
    with counted_reads() as reads:
        read(store)
    assert reads == sizes


def test_stored_rewards_are_tested_with_one_more_read_for_the_tasks(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "new.yaml"
    config.write_text(f"store_uri: {store.uri}\nrewards: {{goal: 1.0}}\n")
    with counted_reads() as reads:
        assert main(["rewards", "test", "--config", str(config), "--on", "last-120"]) == 0
    assert reads == [100, 50, 120] and "120 rollouts" in capsys.readouterr().out
