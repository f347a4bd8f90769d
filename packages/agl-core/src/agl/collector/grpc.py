"""OTLP/gRPC: `TraceService/Export`, plain, gzip or deflate."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NoReturn

import grpc
from google.rpc.code_pb2 import INVALID_ARGUMENT

from agl.collector.receiver import Receiver, RejectedRequest
from agl.errors import AglError
from agl.server.receiving import IDENTITY
from agl.server.tls import grpc_credentials
from agl.store import span_row

_TRACES_METHOD: Final = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
_OTHER_METHODS: Final = (
    "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export",
    "/opentelemetry.proto.collector.logs.v1.LogsService/Export",
)
_REQUESTS_AT_ONCE: Final = 16
"""Threads. A request costs half as much CPU time in a thread as with grpc.aio."""
_KEEPALIVE_MS: Final = 30_000
"""A connection that is lost is noticed after this time; until then its request occupies a thread."""
_STATUS_OF_CODE: Final = {code.value[0]: code for code in grpc.StatusCode}
_ENCODING_OF_FIRST_BYTE: Final = {b"\x1f": "gzip", b"\x78": "deflate"}
"""First byte of a compressed message; no ExportTraceServiceRequest begins with one of them."""


class GrpcReceiver(grpc.GenericRpcHandler):
    """The gRPC server of `receiver`. Metrics and logs are answered with success and discarded.

    The methods are declared as streams of requests, so that a sender is authorized before its message is read.
    Messages are inflated by the receiver, which limits their size; gRPC does not.
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
                ("grpc.so_reuseport", 0),  # Otherwise a second server would share the port silently.
                ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
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

    def stop(self, grace_s: float) -> None:
        """Accept no more requests, and cancel those that are not finished after `grace_s` seconds."""
        self._server.stop(grace_s).wait()
        self._pool.shutdown()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        method = handler_call_details.method
        if method == _TRACES_METHOD:
            return grpc.stream_unary_rpc_method_handler(self._receive_traces)
        if method in _OTHER_METHODS:
            return grpc.stream_unary_rpc_method_handler(self._discard)
        return None

    def _receive_traces(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        try:
            with self._receiver.admit(_authorization(context)) as reservation:
                message = next(requests, None)
                if message is None:
                    raise RejectedRequest(400, INVALID_ARGUMENT, "the call ended without a message")
                self._receiver.reserve(reservation, len(message))
                response = self._receiver.commit(message, _encoding(message), span_row.parse, reservation)
        except RejectedRequest as rejected:
            _abort(context, rejected)
        return response.SerializeToString()

    def _discard(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        try:
            with self._receiver.admit(_authorization(context)):
                next(requests, None)
        except RejectedRequest as rejected:
            _abort(context, rejected)
        return b""


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
