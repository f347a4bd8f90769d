"""OTLP/gRPC: `TraceService/Export`, plain, gzip or deflate."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NoReturn

import grpc
from google.rpc.code_pb2 import INVALID_ARGUMENT, PERMISSION_DENIED

from agl.collector.receiver import Receiver, RejectedRequest, parse_protobuf
from agl.errors import AglError
from agl.server.api_error import ApiError
from agl.server.auth import AllowedHosts
from agl.server.protocol import max_connections
from agl.server.receiving import IDENTITY
from agl.server.tls import grpc_credentials

_TRACES_METHOD: Final = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
_OTHER_METHODS: Final = (
    "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export",
    "/opentelemetry.proto.collector.logs.v1.LogsService/Export",
)
_THREADS: Final = 48
"""A request costs half as much CPU time in a thread as with grpc.aio."""
_READING: Final = 16
"""Messages that arrive at once. gRPC holds each in memory before it reports its size."""
_LEAST_MESSAGE_BYTES: Final = 4 * 2**20
MESSAGE_S: Final = 10.0
"""Limit for receiving a message."""
_TURN_S: Final = 0.1
"""Time, divided by the number of requests that wait for its place, that a message has to arrive in any case. Nearly all
messages arrive together with their request."""
_STREAMS: Final = 1000
"""Limit for each connection."""
_SHARE_OF_FILES: Final = 1 / 8
_HANDSHAKE_MS: Final = 10_000
_IDLE_MS: Final = 30_000
"""A connection without requests is closed after this time; exporters send every few seconds, and connect again."""
_KEEPALIVE_MS: Final = 30_000
"""A connection that is lost is noticed after this time; until then its request occupies a thread."""
_STATUS_OF_CODE: Final = {code.value[0]: code for code in grpc.StatusCode}
_ENCODING_OF_FIRST_BYTE: Final = {b"\x1f": "gzip", b"\x78": "deflate"}
"""First byte of a compressed message; no ExportTraceServiceRequest begins with one of them."""


class GrpcReceiver(grpc.GenericRpcHandler):
    """The gRPC server of `receiver`. Metrics and logs are answered with success and discarded.

    The methods are declared as streams of requests, so that a sender is authorized before its message is read.
    Messages are inflated by the receiver, which limits their size; gRPC does not. All that arrive at once take at most
    `max_pending_bytes`, or 4 MiB each if that is more.
    """

    def __init__(self, receiver: Receiver, hosts: AllowedHosts) -> None:
        self._receiver = receiver
        self._hosts = hosts
        self._arriving = _Arriving()
        self._pool = ThreadPoolExecutor(_THREADS, "agl-otlp-grpc")
        config = receiver.config
        message_bytes = max(config.max_pending_bytes // _READING, _LEAST_MESSAGE_BYTES)
        self._server = grpc.server(
            self._pool,
            handlers=[self],
            options=[
                ("grpc.per_message_decompression", 0),
                ("grpc.max_receive_message_length", min(config.max_body_bytes, message_bytes)),
                ("grpc.so_reuseport", 0),  # Otherwise a second server would share the port silently.
                ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
                ("grpc.max_connection_idle_ms", _IDLE_MS),
                ("grpc.max_concurrent_streams", _STREAMS),
                ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
                ("grpc.max_allowed_incoming_connections", max_connections(_SHARE_OF_FILES)),
            ],
        )

    def bind(self, host: str, port: int) -> int:
        """Listen on `port` (0: any free port) and return it. Raises AglError."""
        address = f"{f'[{host}]' if ':' in host else host}:{port}"
        tls = self._receiver.config.tls
        try:
            if tls is None:
                return self._server.add_insecure_port(address)
            return self._server.add_secure_port(address, grpc_credentials(tls))
        except RuntimeError as error:
            raise AglError(f"the OTLP/gRPC receiver cannot listen on {address}: {error}") from error

    def start(self) -> None:
        self._server.start()
        self._arriving.start()

    def stop(self, grace_s: float) -> None:
        """Accept no more requests, and cancel those that are not finished after `grace_s` seconds."""
        self._server.stop(grace_s).wait()
        self._pool.shutdown()
        self._arriving.stop()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        method = handler_call_details.method
        if method == _TRACES_METHOD:
            return grpc.stream_unary_rpc_method_handler(self._receive_traces)
        if method in _OTHER_METHODS:
            return grpc.stream_unary_rpc_method_handler(self._discard)
        return None

    def _receive_traces(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        try:
            self._check_host(context)
            with self._receiver.admit(_authorization(context), context.peer()) as admitted:
                message = self._arriving.receive(requests, context)
                if message is None:
                    raise RejectedRequest(400, INVALID_ARGUMENT, "the call ended without a message")
                response = self._receiver.commit(message, _encoding(message), parse_protobuf, admitted)
        except RejectedRequest as rejected:
            _abort(context, rejected)
        return response.SerializeToString()

    def _discard(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        try:
            self._check_host(context)
            with self._receiver.admit(_authorization(context), context.peer()):
                self._arriving.receive(requests, context)
        except RejectedRequest as rejected:
            _abort(context, rejected)
        return b""

    def _check_host(self, context: Any) -> None:
        # gRPC for Python has no public name for the authority of a request.
        authority: bytes = context._rpc_event.call_details.host
        try:
            self._hosts.check([authority.decode("latin-1")])
        except ApiError as error:
            raise RejectedRequest(error.http_status, PERMISSION_DENIED, str(error)) from error


class _Arriving:
    """The requests whose message has not arrived: at most _READING, each for at most MESSAGE_S.

    A further request takes the place of another one whose turn is over: of the connection that has the most of them,
    the one that has waited longest. That one is cancelled, after which an exporter sends again.
    """

    def __init__(self) -> None:
        self._since: dict[grpc.ServicerContext, float] = {}
        self._queued = 0
        self._changed = threading.Condition()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="agl-otlp-grpc-arriving", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def receive(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes | None:
        """The first message; None if the sender ends its stream without one."""
        with self._changed:
            self._queued += 1
            while len(self._since) >= _READING:
                self._wait_for_place()
            self._queued -= 1
            self._since[context] = time.monotonic()
        try:
            return next(requests, None)
        finally:
            with self._changed:
                self._since.pop(context, None)
                self._changed.notify()

    def _wait_for_place(self) -> None:
        held = Counter(context.peer() for context in self._since)
        last = min(self._since, key=lambda context: (-held[context.peer()], self._since[context]))
        left_s = self._since[last] + _TURN_S / self._queued - time.monotonic()
        if left_s > 0:
            self._changed.wait(left_s)
        else:
            self._cancel(last)

    def _watch(self) -> None:
        while not self._stopped.wait(1):
            with self._changed:
                oldest = time.monotonic() - MESSAGE_S
                for context in [context for context, since in self._since.items() if since < oldest]:
                    self._cancel(context)

    def _cancel(self, context: grpc.ServicerContext) -> None:
        self._since.pop(context)
        context.cancel()
        self._changed.notify()


def _authorization(context: grpc.ServicerContext) -> bytes | None:
    value = next((value for key, value in context.invocation_metadata() or () if key == "authorization"), None)
    return value.encode() if isinstance(value, str) else value


def _encoding(message: bytes) -> str:
    return _ENCODING_OF_FIRST_BYTE.get(message[:1], IDENTITY)


def _abort(context: grpc.ServicerContext, rejected: RejectedRequest) -> NoReturn:
    status = rejected.status()
    context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    context.abort(_STATUS_OF_CODE[status.code], status.message)
    raise AssertionError("abort raises")
