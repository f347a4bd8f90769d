"""OTLP/gRPC: `TraceService/Export`, plain, gzip or deflate."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NoReturn

import grpc

from agl.collector.receiver import IDENTITY, Receiver, Refusal
from agl.errors import AglError
from agl.server.tls import grpc_credentials
from agl.store import span_row

_TRACES: Final = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
_OTHER_SIGNALS: Final = (
    "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export",
    "/opentelemetry.proto.collector.logs.v1.LogsService/Export",
)
_REQUESTS_AT_ONCE: Final = 16
"""Each holds a thread, which costs half of what grpc.aio does for a request."""
_KEEPALIVE_MS: Final = 30_000
"""A peer that is gone is noticed so soon; until then its request holds a thread."""
_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}
_BEGINNINGS: Final = {b"\x1f": "gzip", b"\x78": "deflate"}
"""First byte of a compressed message; no ExportTraceServiceRequest begins so."""


class GrpcReceiver(grpc.GenericRpcHandler):
    """The gRPC server of `receiver`. Metrics and logs get the success that senders expect, and are not kept.

    Methods are declared as streams of requests: so a sender is admitted before its message is read. Messages are
    inflated by the receiver: gRPC would inflate them whole, whatever they inflate to.
    """

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._pool = ThreadPoolExecutor(_REQUESTS_AT_ONCE, "agl-otlp-grpc")
        self._server = grpc.server(
            self._pool,
            handlers=[self],
            options=[
                ("grpc.per_message_decompression", 0),
                ("grpc.max_receive_message_length", receiver.config.max_body_bytes),
                ("grpc.so_reuseport", 0),  # Else another server shares the port without a word.
                ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
            ],
        )

    def bind(self, host: str, port: int) -> int:
        """Listen on `port` (0: a free one), which is returned. Raises AglError."""
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

    def stop(self, grace_s: float) -> None:
        """Take no more requests; those under way may finish, and are cancelled after `grace_s`."""
        self._server.stop(grace_s).wait()
        self._pool.shutdown()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        method = handler_call_details.method
        if method == _TRACES:
            return grpc.stream_unary_rpc_method_handler(self._receive_traces)
        if method in _OTHER_SIGNALS:
            return grpc.stream_unary_rpc_method_handler(self._pass_over)
        return None

    def _receive_traces(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        try:
            with self._receiver.admit(_authorization(context)) as room:
                message = next(requests, b"")
                self._receiver.hold(room, len(message))
                answer = self._receiver.keep(message, _encoding(message), span_row.read, room)
        except Refusal as refusal:
            _abort(context, refusal)
        return answer.SerializeToString()

    def _pass_over(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        try:
            with self._receiver.admit(_authorization(context)):
                next(requests, None)
        except Refusal as refusal:
            _abort(context, refusal)
        return b""


def _authorization(context: grpc.ServicerContext) -> bytes | None:
    found = (value for key, value in context.invocation_metadata() or () if key == "authorization")
    value = next(found, None)
    return value.encode() if isinstance(value, str) else value


def _encoding(message: bytes) -> str:
    return _BEGINNINGS.get(message[:1], IDENTITY)


def _abort(context: grpc.ServicerContext, refusal: Refusal) -> NoReturn:
    status = refusal.status()
    context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    context.abort(_CODES[status.code], status.message)
    raise AssertionError("abort raises")
