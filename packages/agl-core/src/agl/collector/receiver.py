"""The path of every OTLP request, whichever transport it came by: authorize, inflate, split into rows, commit."""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Final, Protocol

from google.rpc.code_pb2 import DEADLINE_EXCEEDED, INVALID_ARGUMENT, UNAUTHENTICATED, UNAVAILABLE
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from prometheus_client import CollectorRegistry, Counter

from agl.config.collector import CollectorConfig
from agl.errors import InputError, OtlpError, StoreError
from agl.server.api_error import ApiError
from agl.server.auth import BearerTokens, Right
from agl.server.receiving import MemoryBudget, Reservation, check_json, decode_body
from agl.store import span_row
from agl.store.span_row import ParsedSpans, SpanRow

logger = logging.getLogger(__name__)

Parse = Callable[[bytes, Reservation], ParsedSpans]

RETRY_AFTER_S: Final = 1
_MAX_MESSAGE_CHARS = 500
"""A message may quote the request, and gRPC sends it in a header."""
_PARSE_ALONE_BYTES = 2**20
"""Larger bodies are parsed one at a time: a parsed body takes many times its size in memory."""


def parse_protobuf(body: bytes, _: Reservation) -> ParsedSpans:
    return span_row.parse(body, span_row.MAX_SPANS)


def parse_json(body: bytes, reservation: Reservation) -> ParsedSpans:
    """Raises ApiError, before objects are made, if they would take too much memory."""
    check_json(body, reservation)
    return span_row.parse_json(body, span_row.MAX_SPANS)


@dataclass(eq=False)
class RejectedRequest(Exception):
    """A request is not committed: HTTP status, google.rpc.Code and message.

    With the code UNAVAILABLE the sender may repeat the request after RETRY_AFTER_S; other codes are final.
    """

    http_status: int
    code: int
    message: str

    @property
    def is_retryable(self) -> bool:
        return self.code == UNAVAILABLE

    @classmethod
    def of(cls, error: ApiError) -> "RejectedRequest":
        code = {408: DEADLINE_EXCEEDED, 503: UNAVAILABLE}.get(error.http_status, INVALID_ARGUMENT)
        return cls(error.http_status, code, str(error))

    def status(self) -> Status:
        """The google.rpc.Status of an OTLP error response, with RetryInfo if the request may be repeated."""
        status = Status(code=self.code, message=_as_protobuf_text(self.message))
        if self.is_retryable:
            info = RetryInfo()
            info.retry_delay.FromSeconds(RETRY_AFTER_S)
            status.details.add().Pack(info)
        return status


class Sink(Protocol):
    """The store of a project, or the queue in front of it."""

    def append_rows(self, rows: Sequence[SpanRow]) -> int:
        """Persist all of `rows` or none. Raises StoreError; InputError if repeating the call cannot help."""
        ...


class Admitted(Reservation):
    """A request that was authorized for `project`, and the memory that its body takes."""

    def __init__(self, budget: MemoryBudget, peer: str, project: str) -> None:
        super().__init__(budget, peer)
        self.project = project


class Receiver:
    """Commits spans to that of `sinks` which is of the sender's project, within the limits of `config`.

    The sender must have one of `tokens`. A request succeeds only after the commit. Above `max_pending_bytes` requests
    take no memory, and senders must retry.
    """

    def __init__(
        self,
        sinks: Mapping[str, Sink],
        config: CollectorConfig | None = None,
        tokens: BearerTokens | None = None,
    ) -> None:
        self.config = config or CollectorConfig()
        self._sinks = sinks
        self._tokens = tokens or BearerTokens()
        self._budget = MemoryBudget(self.config.max_pending_bytes, self.config.max_body_bytes, "collector")
        self._parsing = threading.Lock()
        self.metrics = CollectorRegistry()
        """Counts of spans and requests, for Prometheus."""
        self._spans = Counter("agl_spans_committed", "Spans that were committed.", registry=self.metrics)
        text = "OTLP requests by HTTP status, also those over gRPC."
        self._requests = Counter("agl_otlp_requests", text, ("status",), registry=self.metrics)

    def admit(self, authorization: bytes | None, peer: str) -> "Admitted":
        """Authorize a request of `peer`. Raises RejectedRequest."""
        grant = self._tokens.grant(authorization)
        if grant is None or not grant.allows(Right.AGENT):
            raise RejectedRequest(
                401, UNAUTHENTICATED, "a bearer token is needed: send the header `Authorization: Bearer ...`"
            )
        return Admitted(self._budget, peer, grant.project)

    def commit(self, body: bytes, encoding: str, parse: Parse, admitted: "Admitted") -> ExportTraceServiceResponse:
        """Commit the spans of a body with one of the content encodings ENCODINGS. Raises RejectedRequest.

        The response is empty if all spans were committed, and a partial success if some of them are invalid.
        """
        try:
            plain = self._decode(body, encoding, admitted)
            with self._parsing if len(plain) > _PARSE_ALONE_BYTES else nullcontext():
                parsed = parse(plain, admitted)
            if parsed.rejected and not parsed.rows:
                raise OtlpError(parsed.reason)
            self._sinks[admitted.project].append_rows(parsed.rows)
        except ApiError as error:
            raise self._counted(RejectedRequest.of(error)) from error
        except (OtlpError, InputError) as error:
            raise self._counted(RejectedRequest(400, INVALID_ARGUMENT, str(error))) from error
        except StoreError as error:
            logger.error("spans were not committed, and senders were asked to retry: %s", error)
            raise self._counted(RejectedRequest(503, UNAVAILABLE, str(error))) from error
        self._spans.inc(len(parsed.rows))
        self._requests.labels("200").inc()
        return _response(parsed)

    def _counted(self, rejected: RejectedRequest) -> RejectedRequest:
        self._requests.labels(str(rejected.http_status)).inc()
        return rejected

    def _decode(self, body: bytes, encoding: str, reservation: Reservation) -> bytes:
        """The plain body. Memory for each piece is reserved before the next one is decoded."""
        reservation.grow_to(len(body))
        try:
            return decode_body(body, encoding, lambda size: reservation.grow_to(len(body) + size, size))
        except ValueError as error:
            raise OtlpError(str(error)) from error


def _response(parsed: ParsedSpans) -> ExportTraceServiceResponse:
    response = ExportTraceServiceResponse()
    if parsed.rejected:
        response.partial_success.rejected_spans = parsed.rejected
        response.partial_success.error_message = _as_protobuf_text(parsed.reason)
    return response


def _as_protobuf_text(message: str) -> str:
    """`message`, shortened and valid as UTF-8: it may quote unpaired surrogates that a JSON body escaped."""
    return message[:_MAX_MESSAGE_CHARS].encode(errors="replace").decode()
