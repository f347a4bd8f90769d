"""The compared instrumentations: ours, the peers', and none. Each is enabled in a separate process."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter

from tests.venv import python_with

ROOT = Path(__file__).parents[1]
_SOURCES = sorted(str(path) for path in (ROOT / "packages").glob("*/src"))


@dataclass(frozen=True, slots=True)
class Switched:
    """An enabled instrumentation: the `callbacks` for every run, and `off`, which disables it.

    `capture` wraps a model that calls its engine without a gateway, so that its token ids are recorded.
    """

    callbacks: list[Any] = field(default_factory=list)
    off: Callable[[], None] = lambda: None
    capture: Callable[[Any], Any] = lambda model: model


SwitchOn = Callable[[TracerProvider, SpanExporter], Switched]


@dataclass(frozen=True, slots=True)
class Instrumentation:
    """One column of the tables. `packages` are the distributions it needs in addition to the framework."""

    name: str
    switch_on: SwitchOn
    packages: tuple[str, ...] = ()
    is_ours: bool = False
    brings_processor: bool = False
    """Whether it registers its own span processor, with the exporter passed to `switch_on`."""

    def python(self) -> str:
        """Interpreter of an environment with its packages. Raises CalledProcessError if they cannot be installed."""
        return str(python_with(f"benchmark-{self.name}", *self.packages)) if self.packages else sys.executable

    def child(self, *arguments: str) -> subprocess.Popen[str]:
        """Start `python -m ...` in its environment, with pipes for input and output and a shared standard error."""
        quiet = {name: value for name, value in os.environ.items() if not name.startswith(("LANGSMITH_", "LANGFUSE_"))}
        paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), *_SOURCES]), "AUTOGEN_DISABLE_RUNTIME_TRACING": "true"}
        return subprocess.Popen(
            [self.python(), "-m", *arguments],
            env=quiet | paths,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def versions(self) -> list[str]:
        """Its packages as `name version`. Call it in its own process, where they are installed."""
        return [f"{package} {version(package)}" for package in self.packages]


def _none(provider: TracerProvider, exporter: SpanExporter) -> Switched:
    return Switched()


def _bare_spans(provider: TracerProvider, exporter: SpanExporter) -> Switched:
    from benchmarks.bare_spans import BareSpans

    return Switched([BareSpans(provider)])


def _ours_langchain(provider: TracerProvider, exporter: SpanExporter) -> Switched:
    from agl.context import RolloutProcessor
    from agl_langchain import LangChainInstrumentor, capture_token_ids

    provider.add_span_processor(RolloutProcessor())
    instrumentor = LangChainInstrumentor()
    instrumentor.instrument(tracer_provider=provider)
    return Switched(off=instrumentor.uninstrument, capture=capture_token_ids)


def _openinference_langchain(provider: TracerProvider, exporter: SpanExporter) -> Switched:
    from openinference.instrumentation.langchain import LangChainInstrumentor

    instrumentor = LangChainInstrumentor()
    instrumentor.instrument(tracer_provider=provider)
    return Switched(off=instrumentor.uninstrument)


def _openllmetry_langchain(provider: TracerProvider, exporter: SpanExporter) -> Switched:
    from opentelemetry.instrumentation.langchain import LangchainInstrumentor

    instrumentor = LangchainInstrumentor()
    instrumentor.instrument(tracer_provider=provider)
    return Switched(off=instrumentor.uninstrument)


def _langfuse(provider: TracerProvider, exporter: SpanExporter) -> Switched:
    from langfuse import Langfuse
    from langfuse.langchain import CallbackHandler

    address = {"public_key": "pk", "secret_key": "sk", "base_url": "http://127.0.0.1:9"}
    Langfuse(**address, tracer_provider=provider, span_exporter=exporter)
    return Switched([CallbackHandler(public_key="pk")])


def _ours_autogen(provider: TracerProvider, exporter: SpanExporter) -> Switched:
    from agl.context import RolloutProcessor
    from agl_autogen import AutoGenInstrumentor

    provider.add_span_processor(RolloutProcessor())
    instrumentor = AutoGenInstrumentor()
    # The environment of the child switches the message bus off, and one situation switches it on again.
    instrumentor.instrument(tracer_provider=provider, message_bus=True)
    return Switched(off=instrumentor.uninstrument)


def _openinference_autogen(provider: TracerProvider, exporter: SpanExporter) -> Switched:
    from openinference.instrumentation.autogen_agentchat import AutogenAgentChatInstrumentor

    instrumentor = AutogenAgentChatInstrumentor()
    instrumentor.instrument(tracer_provider=provider)
    return Switched(off=instrumentor.uninstrument)


NONE = Instrumentation("none", _none)
BARE_SPANS = Instrumentation("bare spans", _bare_spans)
AUTOGEN_ITSELF = Instrumentation("AutoGen itself", _none)

COMPARED: dict[str, Sequence[Instrumentation]] = {
    "langchain": (
        Instrumentation("agl-langchain", _ours_langchain, is_ours=True),
        Instrumentation("openinference", _openinference_langchain, ("openinference-instrumentation-langchain",)),
        Instrumentation("openllmetry", _openllmetry_langchain, ("opentelemetry-instrumentation-langchain",)),
        Instrumentation("langfuse", _langfuse, ("langfuse",), brings_processor=True),
    ),
    "autogen": (
        Instrumentation("agl-autogen", _ours_autogen, is_ours=True),
        Instrumentation(
            "openinference-autogen", _openinference_autogen, ("openinference-instrumentation-autogen-agentchat",)
        ),
    ),
}
"""Instrumentations by framework, ours first. Packages are installed into environments that only benchmarks use."""
