"""The clock of a machine is set while attempts run: their limits count the time that elapses."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agl.store import clock
from tests.store.postgres_server import running_postgres

AGENT = """
import select, sys, time
from pathlib import Path
from agl.store import Resource, Rollout, open_store

uri, clock = sys.argv[1], Path(sys.argv[2])
store = open_store(uri)
store.enqueue_rollouts([Rollout("long", 1, timeout_s=600), Rollout("short", 1, timeout_s=0.5)])
for name in ("long", "short"):
    store.lease_rollout("worker", name)
store.put_resource(Resource("adapter", 0, "uri"))
store.lease_resource("adapter", "holder", 600)
before = time.time()
clock.write_text("+3600")
assert time.time() > before + 3000, "the clock is not set"
other = open_store(uri)
for each in (store, other):
    assert not {"long-a1"} & {attempt.attempt_id for attempt in each.end_overdue_attempts()}
    assert each.collect_resources("adapter", keep=0) == []
clock.write_text("-3600")
select.select([], [], [], 0.6)
other.end_overdue_attempts()
store.end_overdue_attempts()
print(*[store.query_attempts(name)[0].state for name in ("long", "short")])
"""


def test_a_container_in_which_the_machine_started_at_another_time_has_a_clock_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, other = clock.boot_id(), tmp_path / "time"
    other.symlink_to("time:[1]")
    monkeypatch.setattr(clock, "_TIME_NAMESPACE", other)
    assert ours is not None and clock.boot_id() not in (ours, None)


def library() -> Path:
    (found,) = Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")
    return found


@pytest.fixture(params=["sqlite", "postgresql"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Not Cassandra, whose driver sleeps: libfaketime breaks `time.sleep`."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/agl.db"
    else:
        with running_postgres() as server:
            yield server.new_database()


def test_limits_count_elapsed_time_when_the_clock_of_the_machine_is_set(uri: str, tmp_path: Path) -> None:
    offset = tmp_path / "offset"
    offset.write_text("+0")
    environment = os.environ | {"LD_PRELOAD": str(library()), "FAKETIME_TIMESTAMP_FILE": str(offset)}
    environment |= {"FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1"}
    command = [sys.executable, "-c", AGENT, uri, str(offset)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["running", "timeout"], done.stderr
    assert "the clock of this machine was set by +3600 s" in done.stderr
