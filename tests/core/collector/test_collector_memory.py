"""The memory of `agl serve` in a separate process."""

import threading
from pathlib import Path

import httpx

from agl import otlp
from agl.collector.http import PROTOBUF
from tests.core.span_maker import span
from tests.store.serving import serving


def post(url: str, body: bytes, status: list[int]) -> None:
    """POST until the status is not 503."""
    with httpx.Client(headers={"content-type": PROTOBUF}, timeout=60) as client:
        while not status or status[-1] == 503:
            status.append(client.post(url, content=body).status_code)


def peak_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024


def test_many_large_bodies_at_once_take_bounded_memory(tmp_path: Path) -> None:
    """Parsed at once, each would take ten times its 20 MB."""
    ids = list(range(100_000, 100_400))
    some = otlp.encode([span("chat", {"ids": ids, "more": "x" * 1_000}) for _ in range(400)])
    body = some * (20 * 2**20 // len(some))
    with serving(f"sqlite:///{tmp_path}/agl.db") as (process, url):
        statuses: list[list[int]] = [[] for _ in range(4)]
        senders = [threading.Thread(target=post, args=(url, body, status)) for status in statuses]
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join()
        peak = peak_mb(process.pid)
    assert [status[-1] for status in statuses] == [200] * 4
    assert peak < 400
