"""OTLP/HTTP: `POST /v1/traces` in protobuf or JSON, plain or with one of the content encodings."""

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from google.protobuf import json_format
from google.protobuf.message import Message
from google.rpc.code_pb2 import INVALID_ARGUMENT, NOT_FOUND, UNAVAILABLE
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from agl.collector.receiver import RETRY_AFTER_S, Parse, Receiver, RejectedRequest, parse_json, parse_protobuf
from agl.server.api_error import ApiError
from agl.server.receiving import ENCODINGS, IDENTITY, Reservation, peer_of, read_body

PROTOBUF: Final = "application/x-protobuf"
JSON: Final = "application/json"

Headers = Mapping[bytes, bytes]

_TRACES_PATH = "/v1/traces"
_TRACES_PATHS = (_TRACES_PATH, _TRACES_PATH * 2)
"""Exporters append the path also to an endpoint that ends with it already."""
_OTHER_PATHS = ("/v1/metrics", "/v1/logs")
_PARSERS: dict[str, Parse] = {PROTOBUF: parse_protobuf, JSON: parse_json}
_COMMITS_AT_ONCE = 16
"""Threads, each of which waits for the store; the store commits waiting requests together."""
_QUEUE_S = 1.5
"""Limit for the wait for a thread. With that for the store (3 s for Redis) it is less than the 5 to 10 s that senders
wait for a response."""
_HEADERS_OF_STATUS = {
    401: [(b"www-authenticate", b"Bearer")],
    405: [(b"allow", b"POST")],
    503: [(b"retry-after", str(RETRY_AFTER_S).encode())],
}


class HttpReceiver:
    """The ASGI app of `receiver`. Metrics and logs are answered with success and discarded.

    A request is rejected before its body is read if its headers are reason enough.
    """

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._pool = ThreadPoolExecutor(_COMMITS_AT_ONCE, "agl-otlp-http")

    def close(self) -> None:
        """End the threads after the requests in progress."""
        self._pool.shutdown()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers: Headers = dict(scope["headers"])
        content_type = _text(headers, b"content-type").partition(";")[0].rstrip()
        try:
            status, response = 200, await self._handle(scope, headers, content_type, receive)
        except ClientDisconnect:
            return
        except RejectedRequest as rejected:
            status, response = rejected.http_status, rejected.status()
        await _send(send, status, content_type, response)

    async def _handle(self, scope: Scope, headers: Headers, content_type: str, receive: Receive) -> Message:
        _check_route(scope)
        with self._receiver.admit(headers.get(b"authorization"), peer_of(scope)) as admitted:
            if scope["path"] in _OTHER_PATHS:
                return ExportTraceServiceResponse()
            parse, encoding = _parser(content_type), _encoding(headers)
            body = await self._read_body(scope, receive, admitted)
            return await self._commit(body, encoding, parse, admitted)

    async def _commit(self, *request: Any) -> ExportTraceServiceResponse:
        """`Receiver.commit` in a thread. A request that gets none in time may be repeated: its sender does not wait."""
        future = self._pool.submit(self._receiver.commit, *request)
        response = asyncio.wrap_future(future)
        await asyncio.wait({response}, timeout=_QUEUE_S)
        if future.cancel():
            raise RejectedRequest(503, UNAVAILABLE, "earlier requests wait for the store; send the spans again")
        return await response

    async def _read_body(self, scope: Scope, receive: Receive, reservation: Reservation) -> bytes:
        try:
            return await read_body(scope, receive, reservation)
        except ApiError as error:
            raise RejectedRequest.of(error) from error


def _check_route(scope: Scope) -> None:
    if scope["path"] not in (*_TRACES_PATHS, *_OTHER_PATHS):
        raise RejectedRequest(404, NOT_FOUND, f"nothing is at {scope['path']}; spans go to {_TRACES_PATH}")
    if scope["method"] != "POST":
        raise RejectedRequest(405, INVALID_ARGUMENT, f"{scope['path']} takes POST")


def _text(headers: Headers, name: bytes) -> str:
    return headers.get(name, b"").decode("latin-1").strip().lower()


def _parser(content_type: str) -> Parse:
    if content_type not in _PARSERS:
        raise RejectedRequest(415, INVALID_ARGUMENT, f"content type {content_type!r}; expected {' or '.join(_PARSERS)}")
    return _PARSERS[content_type]


def _encoding(headers: Headers) -> str:
    encoding = _text(headers, b"content-encoding") or IDENTITY
    if encoding not in ENCODINGS:
        expected = ", ".join(ENCODINGS)
        raise RejectedRequest(415, INVALID_ARGUMENT, f"content encoding {encoding!r}; expected one of {expected}")
    return encoding


async def _send(send: Send, status: int, content_type: str, response: Message) -> None:
    """Send `response` as protobuf to a sender of protobuf, else as JSON."""
    in_protobuf = content_type == PROTOBUF
    body = response.SerializeToString() if in_protobuf else json_format.MessageToJson(response, indent=None).encode()
    headers = [
        (b"content-type", (PROTOBUF if in_protobuf else JSON).encode()),
        (b"content-length", str(len(body)).encode()),
        *_HEADERS_OF_STATUS.get(status, ()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
