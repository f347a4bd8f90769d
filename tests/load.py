"""A load of spans on a collector, with counts of spans sent, acknowledged, found and duplicated."""

import threading
from collections import Counter
from contextlib import closing
from typing import Self

import httpx

from agl import otlp
from agl.collector.http import PROTOBUF
from agl.store import Store, open_store
from agl.store.span_row import parse
from tests.store.spans import make_span
from tests.waiting import wait_until

SPANS = 50_000
BATCH = 250
_SENDERS = 3
_ROLLOUT = "loaded"


class Load:
    """Senders that start on entry and repeat each batch, to the current `url`, until it is acknowledged.

    They pause soon after the number of spans given to `reach`, so that a fault hits the middle of the load however slow
    the test is. On exit they send the rest of `spans` and wait until all is acknowledged. Each span carries `text`
    extra bytes.
    """

    def __init__(self, url: str = "", text: int = 100, spans: int = SPANS) -> None:
        self.url = url
        self.spans = spans
        self._text = "x" * text
        self.acknowledged: set[int] = set()
        """Numbers of the acknowledged spans."""
        self.answers: Counter[int] = Counter()
        """Number of requests by HTTP status. 0: no response, because the collector was down."""
        self._allowed = 0
        self._next = 1
        self._changed = threading.Condition()
        self._given_up = threading.Event()
        self._senders = [threading.Thread(target=self._run) for _ in range(_SENDERS)]

    @property
    def refused(self) -> int:
        """Number of requests that were not acknowledged and therefore repeated."""
        return self.answers.total() - self.answers[200]

    def reach(self, spans: int) -> set[int]:
        """Continue until at least `spans` spans are acknowledged. Returns the acknowledged numbers."""
        self.allow(spans + self.spans // 5)
        wait_until(lambda: len(self.acknowledged) >= spans)
        with self._changed:
            return set(self.acknowledged)

    def __enter__(self) -> Self:
        for sender in self._senders:
            sender.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._given_up.set()
        self.allow(self.spans)
        for sender in self._senders:
            sender.join(120)
        assert kind is not None or len(self.acknowledged) == self.spans

    def allow(self, spans: int) -> None:
        """Let the senders continue to about `spans` spans."""
        with self._changed:
            self._allowed = spans
            self._changed.notify_all()

    def _run(self) -> None:
        with httpx.Client(headers={"content-type": PROTOBUF}, timeout=30) as client:
            while (batch := self._take()) is not None:
                body = otlp.encode([make_span(number, rollout=_ROLLOUT, text=self._text) for number in batch])
                while not self._send(client, body):
                    if self._given_up.wait(0.1):
                        return
                with self._changed:
                    self.acknowledged.update(batch)

    def _take(self) -> range | None:
        with self._changed:
            self._changed.wait_for(lambda: self._next > self.spans or self._next <= self._allowed)
            if self._next > self.spans:
                return None
            first = self._next
            self._next += BATCH
            return range(first, self._next)

    def _send(self, client: httpx.Client, body: bytes) -> bool:
        try:
            answer = client.post(self.url, content=body)
        except httpx.TransportError:
            status = 0
        else:
            status = answer.status_code
            assert status == 200 or (status == 503 and answer.headers["retry-after"] == "1"), answer.text
        with self._changed:
            self.answers[status] += 1
        return status == 200


def found_in(store: Store) -> Counter[int]:
    """How often the store has each span, by its number."""
    return Counter(int.from_bytes(row.span_id, "big") for row in parse(b"".join(store.query_rows(_ROLLOUT))).rows)


def found_at(uri: str) -> Counter[int]:
    with closing(open_store(uri)) as store:
        return found_in(store)


def check(load: Load, uri: str) -> None:
    """Assert that every sent span was acknowledged and is stored exactly once."""
    found = found_at(uri)
    counts = {
        "acknowledged": len(load.acknowledged),
        "found": len(found),
        "duplicates": found.total() - len(found),
    }
    assert counts == {"acknowledged": load.spans, "found": load.spans, "duplicates": 0}
    with closing(open_store(uri)) as store:
        assert store.count_spans() == load.spans
