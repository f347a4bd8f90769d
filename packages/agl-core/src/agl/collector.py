"""The OTLP/HTTP receiver: spans are answered with success only when the store has committed them."""

import logging
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from google.protobuf import json_format
from google.rpc.status_pb2 import Status
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from agl import otlp
from agl.errors import OtlpError, StoreError
from agl.span import Span
from agl.store import Store

logger = logging.getLogger(__name__)

PROTOBUF: Final = "application/x-protobuf"
JSON: Final = "application/json"

_DECODERS: dict[str, Callable[[bytes], list[Span]]] = {PROTOBUF: otlp.decode, JSON: otlp.decode_json}
_ZLIB_WINDOWS = {"gzip": 31, "deflate": 15}
_RETRY_AFTER_S = 1

# Codes of google.rpc.Code.
_INVALID_ARGUMENT = 3
_RESOURCE_EXHAUSTED = 8
_UNAVAILABLE = 14


@dataclass(eq=False)
class _Refusal(Exception):
    """Why a request is not kept; `code` is one of google.rpc.Code. A 503 asks the sender to try again."""

    http_status: int
    code: int
    message: str


class Collector:
    """Receives OTLP/HTTP for `store`: protobuf and JSON, plain, gzip or deflate.

    A body over `max_body_bytes` (after decompression) is refused with 413, malformed ones with 400; when the store
    cannot keep the spans the answer is 503 with `Retry-After`, which OTLP senders honour.
    """

    def __init__(self, store: Store, *, max_body_bytes: int = 64 * 2**20) -> None:
        self._store = store
        self._max_body_bytes = max_body_bytes

    def routes(self) -> list[Route]:
        return [
            Route("/v1/traces", self._receive_traces, methods=["POST"]),
            Route("/v1/metrics", _accept_unread, methods=["POST"]),
            Route("/v1/logs", _accept_unread, methods=["POST"]),
        ]

    async def _receive_traces(self, request: Request) -> Response:
        content_type = _content_type(request)
        try:
            decode = _DECODERS.get(content_type)
            if decode is None:
                raise _Refusal(
                    415, _INVALID_ARGUMENT, f"content type {content_type!r}; expected {' or '.join(_DECODERS)}"
                )
            encoding = request.headers.get("content-encoding", "identity").strip().lower()
            body = await self._read_body(request)
            await run_in_threadpool(self._keep, body, encoding, decode)
        except ClientDisconnect:
            return Response(status_code=400)  # Nobody is left to read it.
        except _Refusal as refusal:
            return _refuse(content_type, refusal)
        return _success(content_type)

    async def _read_body(self, request: Request) -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            self._check_size(len(body))
        return bytes(body)

    def _keep(self, body: bytes, encoding: str, decode: Callable[[bytes], list[Span]]) -> None:
        try:
            spans = decode(self._decompress(body, encoding))
            self._store.append_spans(spans)
        except OtlpError as error:
            raise _Refusal(400, _INVALID_ARGUMENT, str(error)) from error
        except StoreError as error:
            logger.error("spans refused with 503: %s", error)
            raise _Refusal(503, _UNAVAILABLE, str(error)) from error

    def _decompress(self, body: bytes, encoding: str) -> bytes:
        if encoding == "identity":
            return body
        if encoding not in _ZLIB_WINDOWS:
            known = ", ".join(("identity", *_ZLIB_WINDOWS))
            raise _Refusal(415, _INVALID_ARGUMENT, f"content encoding {encoding!r}; expected one of {known}")
        stream = zlib.decompressobj(_ZLIB_WINDOWS[encoding])
        try:
            plain = stream.decompress(body, self._max_body_bytes + 1)
        except zlib.error as error:
            raise OtlpError(f"the body is not valid {encoding}: {error}") from error
        self._check_size(len(plain))
        if not stream.eof or stream.unused_data:
            raise OtlpError(f"the body is not one whole {encoding} stream")
        return plain

    def _check_size(self, size: int) -> None:
        if size > self._max_body_bytes:
            raise _Refusal(
                413, _RESOURCE_EXHAUSTED, f"the body is over {self._max_body_bytes} bytes; send smaller batches"
            )


async def _accept_unread(request: Request) -> Response:
    """Metrics and logs: senders that always send them get their success; nothing is kept."""
    return _success(_content_type(request))


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _success(content_type: str) -> Response:
    """The empty Export*ServiceResponse: everything was accepted."""
    return Response("{}", media_type=JSON) if content_type == JSON else Response(b"", media_type=PROTOBUF)


def _refuse(content_type: str, refusal: _Refusal) -> Response:
    status = Status(code=refusal.code, message=refusal.message)
    headers = {"retry-after": str(_RETRY_AFTER_S)} if refusal.http_status == 503 else {}
    if content_type == PROTOBUF:
        return Response(status.SerializeToString(), refusal.http_status, headers, PROTOBUF)
    return Response(json_format.MessageToJson(status, indent=None), refusal.http_status, headers, JSON)
