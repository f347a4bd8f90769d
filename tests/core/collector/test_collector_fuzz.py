"""Damaged bodies over both transports: they are rejected without a server error, and valid spans between them are kept.

`AGL_FUZZ=100000 pytest --log-cli-level=INFO tests/core/test_collector_fuzz.py` sends that many and shows what came of
it.
"""

import gzip
import logging
import os
import random
import zlib
from collections import Counter
from http.client import HTTPConnection
from pathlib import Path

import grpc

from agl import otlp
from agl.collector.http import JSON, PROTOBUF
from agl.server_thread import ServerThread
from agl.span import Span, SpanEvent
from tests.core.collecting import collecting

BODIES = int(os.environ.get("AGL_FUZZ", "600"))
SEED = 20261122
GOOD_EVERY = 50
GROWTH_MIB = 40
EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
FAULTS = {*range(500, 600), "UNKNOWN", "INTERNAL", "UNAVAILABLE", "CANCELLED", "DEADLINE_EXCEEDED"}


def good(number: int) -> Span:
    attributes = {"agl.rollout.id": "r", "ids": b"\x01\x02", "names": ["a", "b"], "score": 0.5, "n": number}
    events = (SpanEvent("said", 5, {"text": "hallo"}),)
    return Span("ab" * 16, f"{number + 1:016x}", None, "chat", 1, 2, attributes, events=events)


class Mutator:
    """Damages valid bodies: flips, removes, repeats and inserts bytes, changes lengths, declares wrong encodings."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        spans = [good(number) for number in range(10**9, 10**9 + 4)]
        self._sound = {PROTOBUF: otlp.encode(spans), JSON: otlp.encode_json(spans).encode()}

    def body(self) -> tuple[bytes, str, str]:
        """A body, its content type and its content encoding."""
        draw = self._random
        content_type = draw.choice([PROTOBUF, PROTOBUF, JSON])
        body, encoding = (
            self._damage(self._sound[content_type]),
            draw.choice(["identity", "identity", "gzip", "deflate"]),
        )
        if encoding != "identity":
            body = gzip.compress(body, 1) if encoding == "gzip" else zlib.compress(body, 1)
            if draw.random() < 0.5:
                body = self._damage(body)
        if draw.random() < 0.05:
            content_type, encoding = draw.choice([JSON, PROTOBUF, "text/x"]), draw.choice(["gzip", "identity", "br"])
        return body, content_type, encoding

    def _damage(self, sound: bytes) -> bytes:
        body, draw = bytearray(sound), self._random
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(body) + 1)
            match draw.randrange(12):
                case 0:
                    del body[at:]
                case 1:
                    del body[at : at + draw.randrange(1, 40)]
                case 2:
                    body[at:at] = body[at : at + draw.randrange(1, 200)]
                case 3:
                    body[at:at] = draw.choice(
                        [b"\xff" * 9, b"\x00", b"[" * 900, b"null", b"1e999", b"\\ud800", draw.randbytes(8)]
                    )
                case _ if at < len(body):
                    body[at] ^= 1 << draw.randrange(8)
        return bytes(body)


class Senders:
    """One persistent connection per transport; the methods return the status of the response."""

    def __init__(self, server: ServerThread) -> None:
        host, port = server.otlp_url.removeprefix("http://").split(":")
        self._http = HTTPConnection(host, int(port), timeout=20)
        self._channel = grpc.insecure_channel(str(server.otlp_grpc_url).removeprefix("http://"))
        self._export = self._channel.unary_unary(EXPORT)

    def over_http(self, body: bytes, content_type: str, encoding: str) -> int:
        self._http.request("POST", "/v1/traces", body, {"content-type": content_type, "content-encoding": encoding})
        answer = self._http.getresponse()
        answer.read()
        return answer.status

    def over_grpc(self, body: bytes) -> str:
        try:
            self._export(body, timeout=20)
        except grpc.RpcError as error:
            return error.code().name
        return grpc.StatusCode.OK.name

    def close(self) -> None:
        self._http.close()
        self._channel.close()


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_no_body_causes_a_server_error_and_valid_spans_between_them_are_kept(tmp_path: Path) -> None:
    mutator = Mutator(SEED)
    answers: Counter[int | str] = Counter()
    sizes: list[float] = []
    with collecting(uri=f"sqlite:///{tmp_path}/agl.db", max_body_bytes=2**20) as (store, server):
        senders = Senders(server)
        for number in range(BODIES):
            body = mutator.body()
            answer = senders.over_http(*body) if number % 2 else senders.over_grpc(body[0])
            assert answer not in FAULTS, (answer, number, body)
            answers[answer] += 1
            if number % GOOD_EVERY == 0:
                assert senders.over_http(otlp.encode([good(number)]), PROTOBUF, "identity") == 200
                assert senders.over_grpc(otlp.encode([good(number + 1)])) == "OK"
            if number % (BODIES // 10) == 0:
                sizes.append(resident_mib())
        senders.close()
        kept = {span.attributes.get("n") for span in store.query_spans("r")}
    logging.getLogger(__name__).info("%s, resident MiB: %s", dict(answers), [round(size) for size in sizes])
    assert kept >= {number + one for number in range(0, BODIES, GOOD_EVERY) for one in (0, 1)}
    assert answers[200] and answers["OK"] and answers[400] and answers["INVALID_ARGUMENT"]
    assert sizes[-1] - sizes[1] < GROWTH_MIB
