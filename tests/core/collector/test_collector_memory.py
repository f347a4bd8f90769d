"""The memory of `agl serve` in a separate process."""

import gzip
import re
import threading
from pathlib import Path

import httpx
import pytest

from agl import otlp
from agl.collector.http import JSON, PROTOBUF
from agl.gateway import exchange
from agl.server.api_error import ApiError
from agl.server.receiving import MemoryBudget, Reservation, _outside_strings, check_json
from agl.server_thread import ServerThread
from agl.store import open_store
from agl.store.http import routes
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


def field(number: int, payload: bytes) -> bytes:
    """A length-delimited field of protobuf."""
    length, varint = len(payload), bytearray([number << 3 | 2])
    while length > 0x7F:
        varint.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([*varint, length]) + payload


def with_span(more: bytes) -> bytes:
    ids = field(1, b"a" * 16) + field(2, b"b" * 8)
    return field(1, field(2, field(2, ids + more)))


MANY = 2 * 2**20
BOMBS = {
    "spans": field(1, field(2, b"\x12\x00" * MANY)),
    "scopes": field(1, b"\x12\x00" * MANY),
    "resources": b"\x0a\x00" * MANY,
    "parts of a resource": field(1, b"\x0a\x00" * MANY),
    "attributes": with_span(b"\x4a\x00" * MANY),
    "attributes of several spans": with_span(b"\x4a\x00" * (MANY // 8)) * 8,
    "events": with_span(b"\x5a\x00" * MANY),
    "items of a list": with_span(field(9, field(1, b"k") + field(2, field(5, b"\x0a\x00" * MANY)))),
    "another encoding": b"\x88\x80\x00\x01" + field(1, field(2, b"\x12\x00" * MANY)),
    "copies of a resource": field(1, field(1, field(1, field(1, b"x" * 200_000))) + field(2, field(2, b"") * 20_000)),
    "valid spans": with_span(b"") * 2**16,
    "spans in JSON": b'{"resourceSpans":[{"scopeSpans":[{"spans":[' + b"{}," * MANY + b"{}]}]}]}",
    "lists in JSON": b"[" + b"[]," * MANY + b"[]]",
}


def test_a_body_of_many_small_elements_is_refused_before_objects_are_made_of_them(tmp_path: Path) -> None:
    """As objects they would take hundreds of megabytes each."""
    with serving(f"sqlite:///{tmp_path}/agl.db") as (process, url):
        before = peak_mb(process.pid)
        for name, bomb in BOMBS.items():
            content_type = JSON if name.endswith("JSON") else PROTOBUF
            headers = {"content-type": content_type, "content-encoding": "gzip"}
            answer = httpx.post(url, content=gzip.compress(bomb, 1), headers=headers, timeout=120)
            assert answer.status_code in (400, 413), name
            assert "send fewer" in answer.text, name
        assert peak_mb(process.pid) - before < 120


def test_elements_are_counted_outside_of_strings_and_their_memory_is_reserved() -> None:
    budget = MemoryBudget(2**27, 2**25, "gateway")
    text = b'["' + b'{\\"a\\": [1, 2, 3]}, ' * 2**16 + b'"]'
    for harmless in (text, b"[" + b"1," * 2**20 + b"1]", b'"' + b'\\"' * 2**20):
        with Reservation(budget, "a") as reservation:
            check_json(harmless, reservation)
            assert (reservation.size > len(harmless)) is harmless.startswith(b"[1")
    with pytest.raises(ApiError, match="too many values; send fewer") as caught:
        check_json(b"[" + b"{}," * 2**19 + b"{}]", Reservation(budget, "a"))
    assert caught.value.http_status == 413
    with Reservation(budget, "a") as other:
        other.grow_to(2**27 - 2**22, 0)
        with pytest.raises(ApiError, match="no memory for this body"):
            check_json(b"[" + b"{}," * 2**17 + b"{}]", Reservation(budget, "b"))


def test_strings_are_left_out_by_short_pieces_so_that_other_threads_go_on() -> None:
    for text in (
        b'"",',
        b'"ab",',
        b'"\\",",',
        b'"\\\\",',
        b'"a" ,' + b" " * 20,
        b'"' + b"[" * 2**17 + b'",',
        b'{"a": [1]},',
    ):
        whole = b"[" + text * (2**20 // len(text)) + b'"'
        pieces = list(_outside_strings(whole))
        assert len(pieces) > 1 and max(map(len, pieces)) <= 2**16
        assert b"".join(pieces) == re.sub(rb'"(?:[^"\\]|\\.)*"?', b"", whole)


def test_a_long_body_is_counted_outside_of_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    for module in (exchange, routes):
        monkeypatch.setattr(module, "check_json", lambda *_: threads.append(threading.current_thread().name))
    store = open_store("memory://")
    with ServerThread(store, port=0, otlp_http_port=0) as server:
        for path in ("/v1/chat/completions", "/api/v1/enqueue_rollouts"):
            for text in (b"[1]", b"[" + b'"",' * 2**17 + b"1]"):
                httpx.post(server.base_url + path, content=text, headers={"content-type": JSON})
    store.close()
    assert [name == "agl-server" for name in threads] == [True, False] * 2
