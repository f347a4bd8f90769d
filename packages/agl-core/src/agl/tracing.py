"""Export of spans to the collector: the tracer provider, the queue of ended spans, and the OTLP exporter."""

import logging
import os
import secrets
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.util import Finalize, register_after_fork
from typing import Any
from weakref import WeakKeyDictionary

from opentelemetry import trace
from opentelemetry.sdk.environment_variables import OTEL_SERVICE_NAME
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import IdGenerator

from agl.content.filter import process_max_bytes, process_redact, use_max_bytes, use_redaction
from agl.content.redaction import Redact
from agl.context import RolloutProcessor
from agl.emit.reward import process_weights, use_weights
from agl.errors import ConfigError
from agl.propagation import join_environment
from agl.secret_url import SecretUrl

logger = logging.getLogger(__name__)

QUEUE_SPANS = 65_536
"""Most spans that wait for the collector. The SDK's default of 2,048 is less than one burst of a training step."""
BATCH_SPANS = 128
"""Spans in one request: few enough that long prompts stay below the exporter's limit of 64 MiB a request."""
DELAY_MS = 1_000
"""Longest time that a batch waits to be full."""


def init(
    service_name: str | None = None,
    *,
    endpoint: str | None = None,
    reward_weights: Mapping[str, float] | None = None,
    redact: Redact | None = None,
    content_max_bytes: int | None = None,
) -> TracerProvider:
    """Send the spans of this process to a collector.

        agl.init(service_name="my-agent")

    `service_name`: `service.name` of the resource (default: `$OTEL_SERVICE_NAME`, else `agent`).
    `endpoint`: base URL of the collector, `/v1/traces` is appended (default: `$OTEL_EXPORTER_OTLP_ENDPOINT`, else
    http://localhost:4318). `reward_weights`: weight of each reward dimension (see `emit_reward`). `redact`: a function
    from str to str, applied to each text that an emitter or a plug-in records; a plug-in may have its own instead (see
    `agl.content.filter`). `content_max_bytes`: longer texts on spans are cut (default: 1 MiB). A second call may change
    the last three only.

    An SDK provider that is already the global one stays, with its name and exporters, and our exporter is added. In a
    process started with `agl.environment()` the rollout of the parent process continues.

    Raises ConfigError for an endpoint that is not an http(s) URL, a `redact` that is not callable, a limit that is
    not positive, or a global provider that is not the SDK's, and TelemetryError for a weight that is not a finite
    number.
    """
    url = _traces_url(endpoint)
    with _lock:
        if reward_weights is not None:
            use_weights(reward_weights)
        if redact is not None:
            use_redaction(redact)
        if content_max_bytes is not None:
            use_max_bytes(content_max_bytes)
        provider = _sdk_provider(service_name)
        _collector_of(provider).open(url)
    join_environment()
    return provider


def flush(timeout_s: float = 30.0) -> bool:
    """Send all spans that have ended. True if none has been lost since the last flush, and all are sent in time."""
    collector = _collectors.get(trace.get_tracer_provider())
    return collector is not None and collector.force_flush(round(timeout_s * 1000))


def shutdown() -> None:
    """Send the queued spans and stop exporting, until `init` is called again. Runs automatically at process exit."""
    collector = _collectors.get(trace.get_tracer_provider())
    if collector is not None:
        collector.shutdown()


def export_settings() -> dict[str, Any] | None:
    """Arguments with which `init` exports from another process as from this one; None if nothing is exported."""
    provider = trace.get_tracer_provider()
    collector = _collectors.get(provider)
    if collector is None or not collector.is_open or not isinstance(provider, TracerProvider):
        return None
    return {
        "service_name": str(provider.resource.attributes.get(SERVICE_NAME)),
        "endpoint": collector.url and collector.url.secret,
        "reward_weights": process_weights(),
        "redact": process_redact(),
        "content_max_bytes": process_max_bytes(),
    }


class CollectorExporter(SpanExporter):
    """OTLP over HTTP; counts the spans that were sent, and those that the collector did not accept.

    `url` None: the standard environment variables decide (`OTEL_EXPORTER_OTLP_ENDPOINT` and related ones).
    """

    def __init__(self, url: SecretUrl | None) -> None:
        # Imported here because it loads an HTTP client, which a process that exports nothing does not need.
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        self.url = url
        self.sent = 0
        """Spans that the collector has accepted or not."""
        self.lost = 0
        self.progress = threading.Condition()
        """Notified when `sent` grows."""
        self._otlp = OTLPSpanExporter(endpoint=url and url.secret)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = SpanExportResult.FAILURE
        try:
            result = self._otlp.export(spans)
        finally:
            if result is not SpanExportResult.SUCCESS:
                self.lose(len(spans))
                logger.error(
                    "%d spans are lost: the collector did not accept them; is `agl serve` running?", len(spans)
                )
            with self.progress:
                self.sent += len(spans)
                self.progress.notify_all()
        return result

    def lose(self, spans: int) -> None:
        with self.progress:
            self.lost += spans

    def shutdown(self) -> None:
        self._otlp.shutdown()


class CollectorProcessor(SpanProcessor):
    """Queue and exporter, created by `open` and dropped by `shutdown`: a provider cannot remove a processor."""

    def __init__(self) -> None:
        self._exporter: CollectorExporter | None = None
        self._batch: BatchSpanProcessor | None = None
        self._lost_at_last_flush = 0
        self._lock = threading.Lock()
        self._ended = 0
        """Spans that were handed to the queue, which never has more than its capacity: it would drop some by itself."""

    @property
    def is_open(self) -> bool:
        return self._exporter is not None

    @property
    def url(self) -> SecretUrl | None:
        return self._exporter.url if self._exporter else None

    def reopen(self) -> None:
        """Start anew in a forked child: connections and thread stay with the parent, which also sends its own queue."""
        if self._exporter is not None:
            url, self._exporter, self._batch = self._exporter.url, None, None
            self.open(url)

    def open(self, url: SecretUrl | None) -> None:
        """Start exporting to `url`. Does nothing if already exporting."""
        if self._exporter is not None:
            if url not in (None, self._exporter.url):
                logger.warning("spans still go to %s, not to %s: call agl.shutdown() first", self._exporter.url, url)
            return
        self._exporter = CollectorExporter(url)
        self._lost_at_last_flush = self._ended = 0
        self._lock = threading.Lock()  # In a forked child, a thread of the parent may have held the other.
        self._batch = BatchSpanProcessor(self._exporter, QUEUE_SPANS, DELAY_MS, BATCH_SPANS)

    def on_end(self, span: ReadableSpan) -> None:
        batch, exporter = self._batch, self._exporter
        if batch is None or exporter is None or not span.context or not span.context.trace_flags.sampled:
            return
        with self._lock:
            if fits := self._ended - exporter.sent < QUEUE_SPANS:
                self._ended += 1
        if fits:
            batch.on_end(span)
            return
        if exporter.lost == self._lost_at_last_flush:  # Once, until it is reported.
            logger.error("spans are lost: %d wait for the collector already, which is too slow", QUEUE_SPANS)
        exporter.lose(1)

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Waits for the spans that have ended by now only: where others go on ending, the queue may never be empty."""
        batch, exporter = self._batch, self._exporter
        if batch is None or exporter is None:
            return False
        ended = self._ended
        # A thread, because the SDK's own flush ignores its timeout.
        threading.Thread(target=batch.force_flush, daemon=True).start()
        with exporter.progress:
            in_time = exporter.progress.wait_for(lambda: exporter.sent >= ended, timeout_millis / 1000)
        lost, self._lost_at_last_flush = exporter.lost - self._lost_at_last_flush, exporter.lost
        return in_time and not lost

    def shutdown(self) -> None:
        batch, self._batch, self._exporter = self._batch, None, None
        if batch is not None:
            batch.shutdown()


class _Ids(IdGenerator):
    """Ids from the system's randomness: agents seed Python's `random`, and equal seeds would repeat the ids."""

    def generate_span_id(self) -> int:
        return secrets.randbits(64) or self.generate_span_id()

    def generate_trace_id(self) -> int:
        return secrets.randbits(128) or self.generate_trace_id()

    def is_trace_id_random(self) -> bool:
        return True


_lock = threading.Lock()
_collectors: WeakKeyDictionary[trace.TracerProvider, CollectorProcessor] = WeakKeyDictionary()


def _traces_url(endpoint: str | None) -> SecretUrl | None:
    if endpoint is None:
        return None
    url = SecretUrl(endpoint)
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"endpoint is {url!r}, expected the collector's URL, e.g. http://localhost:4318")
    return SecretUrl(url.secret.rstrip("/").removesuffix("/v1/traces") + "/v1/traces")


def _sdk_provider(service_name: str | None) -> TracerProvider:
    """The global provider; created if there is none."""
    if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        resource = Resource.create({SERVICE_NAME: service_name or os.environ.get(OTEL_SERVICE_NAME, "agent")})
        trace.set_tracer_provider(TracerProvider(resource=resource, id_generator=_Ids()))
    provider = trace.get_tracer_provider()
    if not isinstance(provider, TracerProvider):
        raise ConfigError(
            f"the global tracer provider is {type(provider).__name__}, expected an OpenTelemetry SDK TracerProvider; "
            "set one, or none, before agl.init()"
        )
    return provider


def _collector_of(provider: TracerProvider) -> CollectorProcessor:
    """Our exporting processor of `provider`; if it is new, it is added together with a `RolloutProcessor`."""
    if provider not in _collectors:
        _collectors[provider] = CollectorProcessor()
        provider.add_span_processor(RolloutProcessor())
        provider.add_span_processor(_collectors[provider])
        register_after_fork(_collectors[provider], _flush_at_exit)
    return _collectors[provider]


def _flush_at_exit(collector: CollectorProcessor) -> None:
    """In a multiprocessing child, which skips `atexit` handlers but runs its own finalizers."""
    Finalize(collector, collector.force_flush, exitpriority=0)


def _reopen_all() -> None:
    for collector in list(_collectors.values()):
        collector.reopen()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reopen_all)
