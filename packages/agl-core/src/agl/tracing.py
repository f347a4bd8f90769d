"""Spans on their way to the collector: the exporter, its queue, and the tracer provider they hang on."""

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

from agl.content.content import redaction_in_use, use_redaction
from agl.content.redaction import Redact
from agl.context import RolloutProcessor, join_environment
from agl.emit.reward import use_weights, weights_in_use
from agl.errors import ConfigError

logger = logging.getLogger(__name__)

QUEUE_SPANS = 65_536
"""Spans that may wait for the collector; the SDK's 2,048 are less than one burst of a training step."""
BATCH_SPANS = 128
"""Spans in one request: small enough that long prompts stay below the exporter's 64 MiB a request."""
DELAY_MS = 1_000
"""Longest wait before a batch that is not full is sent."""


def init(
    service_name: str | None = None,
    *,
    endpoint: str | None = None,
    reward_weights: Mapping[str, float] | None = None,
    redact: Redact | None = None,
) -> TracerProvider:
    """Send the spans of this process to a collector. Called again it changes what it is given of the last two.

    `service_name`: `service.name` of the resource (default: `$OTEL_SERVICE_NAME`, else `agent`).
    `endpoint`: base URL of the collector, `/v1/traces` is appended (default: `$OTEL_EXPORTER_OTLP_ENDPOINT`, else
    http://localhost:4318). `reward_weights`: weight of each reward dimension (see `emit_reward`). `redact`: a function
    from str to str that sees each text before it is on a span of the emitters, or of a plug-in that was given none of
    its own (see `agl.content.content`).
    A global SDK provider that is already set stays, with its name and its exporters; ours is added to it.
    A process that was started with `agl.environment()` goes on in the rollout that was in force there.
    Raises ConfigError for an endpoint that is no URL, a `redact` that is no function or a provider that is not the
    SDK's, TelemetryError for a weight.
    """
    url = _traces_url(endpoint)
    with _lock:
        if reward_weights is not None:
            use_weights(reward_weights)
        if redact is not None:
            use_redaction(redact)
        provider = _sdk_provider(service_name)
        _collector_of(provider).open(url)
    join_environment()
    return provider


def flush(timeout_s: float = 30.0) -> bool:
    """Send every span that has ended. True when the collector took them all, and lost none since the last flush."""
    collector = _collectors.get(trace.get_tracer_provider())
    return collector is not None and collector.force_flush(round(timeout_s * 1000))


def shutdown() -> None:
    """Send what waits and stop exporting; `init` starts again. Runs by itself when the process ends."""
    collector = _collectors.get(trace.get_tracer_provider())
    if collector is not None:
        collector.shutdown()


def settings() -> dict[str, Any] | None:
    """What `init` must be given in another process to export as this one does; None where nothing is exported."""
    provider = trace.get_tracer_provider()
    collector = _collectors.get(provider)
    if collector is None or not collector.is_open or not isinstance(provider, TracerProvider):
        return None
    name = provider.resource.attributes.get(SERVICE_NAME)
    return {
        "service_name": str(name),
        "endpoint": collector.url,
        "reward_weights": weights_in_use(),
        "redact": redaction_in_use(),
    }


class CollectorExporter(SpanExporter):
    """OTLP over HTTP that counts what the collector did not take, so that `flush` can tell.

    `url` None leaves the choice to the standard variables (`OTEL_EXPORTER_OTLP_ENDPOINT` and its kin).
    """

    def __init__(self, url: str | None) -> None:
        # Imported here because it loads an HTTP client, and not every process that imports agl exports.
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        self.url = url
        self.lost = 0
        self._otlp = OTLPSpanExporter(endpoint=url)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._otlp.export(spans)
        if result is not SpanExportResult.SUCCESS:
            self.lost += len(spans)
            logger.error("%d spans are lost: the collector did not take them; is `agl serve` running?", len(spans))
        return result

    def shutdown(self) -> None:
        self._otlp.shutdown()


class CollectorProcessor(SpanProcessor):
    """Queue and exporter, plugged in by `open` and out by `shutdown`: a provider never gives a processor back."""

    def __init__(self) -> None:
        self._exporter: CollectorExporter | None = None
        self._batch: BatchSpanProcessor | None = None
        self._told_lost = 0

    @property
    def is_open(self) -> bool:
        return self._exporter is not None

    @property
    def url(self) -> str | None:
        return self._exporter.url if self._exporter else None

    def reopen(self) -> None:
        """In a forked child: connections, queue and thread are the parent's. What waited there is sent there."""
        if self._exporter is not None:
            url, self._exporter, self._batch = self._exporter.url, None, None
            self.open(url)

    def open(self, url: str | None) -> None:
        """Start exporting to `url`; does nothing while it exports already."""
        if self._exporter is not None:
            if url not in (None, self._exporter.url):
                logger.warning("spans go on to %s, not to %s: call agl.shutdown() first", self._exporter.url, url)
            return
        self._exporter = CollectorExporter(url)
        self._told_lost = 0
        self._batch = BatchSpanProcessor(self._exporter, QUEUE_SPANS, DELAY_MS, BATCH_SPANS)

    def on_end(self, span: ReadableSpan) -> None:
        if batch := self._batch:
            batch.on_end(span)

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        batch, exporter = self._batch, self._exporter
        if batch is None or exporter is None:
            return False
        # The SDK's own flush takes no notice of its timeout.
        flushing = threading.Thread(target=batch.force_flush, daemon=True)
        flushing.start()
        flushing.join(timeout_millis / 1000)
        lost, self._told_lost = exporter.lost - self._told_lost, exporter.lost
        return not flushing.is_alive() and not lost

    def shutdown(self) -> None:
        batch, self._batch, self._exporter = self._batch, None, None
        if batch is not None:
            batch.shutdown()


class _Ids(IdGenerator):
    """Ids from the system's randomness: agents seed Python's own, and the same seed would give the same ids again."""

    def generate_span_id(self) -> int:
        return secrets.randbits(64) or self.generate_span_id()

    def generate_trace_id(self) -> int:
        return secrets.randbits(128) or self.generate_trace_id()

    def is_trace_id_random(self) -> bool:
        return True


_lock = threading.Lock()
_collectors: WeakKeyDictionary[trace.TracerProvider, CollectorProcessor] = WeakKeyDictionary()


def _traces_url(endpoint: str | None) -> str | None:
    if endpoint is None:
        return None
    if not endpoint.startswith(("http://", "https://")):
        raise ConfigError(f"endpoint is {endpoint!r}, expected the collector's URL, e.g. http://localhost:4318")
    return endpoint.rstrip("/").removesuffix("/v1/traces") + "/v1/traces"


def _sdk_provider(service_name: str | None) -> TracerProvider:
    """The global provider, made if there is none."""
    if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        name = service_name or os.environ.get(OTEL_SERVICE_NAME, "agent")
        resource = Resource.create({SERVICE_NAME: name})
        trace.set_tracer_provider(TracerProvider(resource=resource, id_generator=_Ids()))
    provider = trace.get_tracer_provider()
    if not isinstance(provider, TracerProvider):
        raise ConfigError(
            f"the global tracer provider is {type(provider).__name__}, expected an OpenTelemetry SDK TracerProvider; "
            "set one, or none, before agl.init()"
        )
    return provider


def _collector_of(provider: TracerProvider) -> CollectorProcessor:
    """Our exporting processor on `provider`, hung there with the stamping one if it is new."""
    if provider not in _collectors:
        _collectors[provider] = CollectorProcessor()
        provider.add_span_processor(RolloutProcessor())
        provider.add_span_processor(_collectors[provider])
        register_after_fork(_collectors[provider], _send_at_the_end)
    return _collectors[provider]


def _send_at_the_end(collector: CollectorProcessor) -> None:
    """A child of multiprocessing ends without the exit handlers of Python, but not without its own."""
    Finalize(collector, collector.force_flush, exitpriority=0)


def _reopen_all() -> None:
    for collector in list(_collectors.values()):
        collector.reopen()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reopen_all)
