"""`agl serve` killed, and out of room, in the middle of a load: what was sent, acknowledged and found, counted."""

import resource
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from agl import otlp
from agl.store import open_store
from agl.store.sqlite import upkeep
from tests.store.serving import serving
from tests.store.spans import make_span

SPANS, BATCH = 5_000, 50


@dataclass
class Load:
    """Senders that send each batch until it is acknowledged, wherever the receiver then is."""

    url: str = ""
    acknowledged: set[int] = field(default_factory=set)
    """Spans."""
    requests: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, batches: list[list[int]]) -> None:
        with httpx.Client() as client:
            for batch in batches:
                body = otlp.encode([make_span(number, rollout="r1", text="x" * 500) for number in batch])
                while not self._send(client, body):
                    time.sleep(0.05)
                with self._lock:
                    self.acknowledged.update(batch)

    def _send(self, client: httpx.Client, body: bytes) -> bool:
        with self._lock:
            self.requests += 1
        try:
            answer = client.post(self.url, content=body, headers={"content-type": "application/x-protobuf"})
        except httpx.TransportError:
            return False
        with self._lock:
            self.statuses[answer.status_code] += 1
        if answer.status_code == 503:
            assert answer.headers["retry-after"] == "1"
        return answer.status_code == 200


@contextmanager
def sending(load: Load) -> Iterator[None]:
    """All spans are on their way inside, and have been acknowledged after."""
    batches = [list(range(first, first + BATCH)) for first in range(1, SPANS + 1, BATCH)]
    senders = [threading.Thread(target=load.run, args=(batches[part::3],)) for part in range(3)]
    for sender in senders:
        sender.start()
    yield
    for sender in senders:
        sender.join(60)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def found_in(path: Path) -> Counter[int]:
    with closing(open_store(f"sqlite:///{path}")) as store:
        return Counter(int(span.span_id, 16) for span in store.query_spans("r1"))


def counts(load: Load, path: Path) -> dict[str, int]:
    found = found_in(path)
    return {
        "sent": SPANS,
        "acknowledged": len(load.acknowledged),
        "found": len(found),
        "duplicates": found.total() - len(found),
    }


def test_a_collector_killed_twice_in_a_load_loses_nothing_that_it_acknowledged(tmp_path: Path) -> None:
    load, path = Load(), tmp_path / "agl.db"
    with sending(load):
        for part in (1, 2):
            with serving(path) as (process, load.url):
                wait_until(lambda part=part: len(load.acknowledged) >= part * SPANS // 3)
                process.kill()
                acknowledged = set(load.acknowledged)
            assert acknowledged <= set(found_in(path))
        assert len(load.acknowledged) < SPANS
        with serving(path) as (_, load.url):
            wait_until(lambda: len(load.acknowledged) == SPANS)
    assert counts(load, path) == {"sent": SPANS, "acknowledged": SPANS, "found": SPANS, "duplicates": 0}
    assert load.requests > SPANS // BATCH
    assert upkeep.check(path) == []


def test_a_full_disk_is_answered_with_retry_later_and_harms_nothing(tmp_path: Path) -> None:
    """A limit on the size of the process's files stands in for the disk; the write-ahead log meets it first."""
    load, path = Load(), tmp_path / "agl.db"
    with serving(path) as (process, load.url):
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))
        with sending(load):
            wait_until(lambda: load.statuses[503] >= 5)
            assert len(load.acknowledged) < SPANS
            assert load.acknowledged <= set(found_in(path))  # Whoever reads still can.
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            wait_until(lambda: len(load.acknowledged) == SPANS)
    assert counts(load, path) == {"sent": SPANS, "acknowledged": SPANS, "found": SPANS, "duplicates": 0}
    assert set(load.statuses) == {200, 503}
    assert upkeep.check(path) == []


READ_WITHOUT_ROOM = """
import resource, sys
from agl.errors import StoreError
from agl.store import open_store
from tests.store.serving import serving
from tests.store.spans import make_span

resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
store = open_store(sys.argv[1])
print(len(store.query_spans("r1")))
try:
    store.append_spans([make_span(2)])
except StoreError as error:
    print(error)
"""


def test_a_store_on_a_full_disk_can_be_opened_and_read(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/agl.db"
    with closing(open_store(uri)) as store:
        store.append_spans([make_span(1, rollout="r1")])
        reader = [sys.executable, "-c", READ_WITHOUT_ROOM, uri]
        done = subprocess.run(reader, capture_output=True, text=True, timeout=60, check=True)
        found, refusal = done.stdout.splitlines()
        assert found == "1"
        assert "did not keep the change" in refusal and "look at the disk" in refusal
        assert store.append_spans([make_span(2)]) == 1
