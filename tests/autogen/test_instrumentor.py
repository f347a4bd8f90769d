"""`instrument` and `uninstrument`: what is replaced, what comes back, and the arguments."""

import subprocess
import sys
from importlib.metadata import entry_points
from typing import Any

import pytest
from autogen_agentchat.teams import BaseGroupChat
from autogen_ext.models.openai import BaseOpenAIChatCompletionClient
from autogen_ext.models.replay import ReplayChatCompletionClient
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from agl.errors import ConfigError
from agl_autogen import AutoGenInstrumentor
from tests.autogen.conftest import MODEL_INFO
from tests.autogen.span_tree import attributes, only

REPLACED = {
    "BaseGroupChat.run_stream",
    "SequentialRoutedAgent.on_message",
    "BaseChatAgent.run_stream",
    "BaseChatAgent.on_messages_stream",
    "BaseChatAgent.__init_subclass__",
    "AssistantAgent.on_messages",
    "AssistantAgent.on_messages_stream",
    "_base_chat_agent.trace_invoke_agent_span",
    "_chat_agent_container.trace_invoke_agent_span",
    "BaseAgent.on_message",
    "_single_threaded_agent_runtime.get_telemetry_envelope_metadata",
    "_base.trace_tool_span",
    "ChatCompletionClient.__init_subclass__",
    "ReplayChatCompletionClient.create",
    "ReplayChatCompletionClient.create_stream",
    "LLMCallEvent.__init__",
    "BaseOpenAIChatCompletionClient.create",
    "BaseOpenAIChatCompletionClient.create_stream",
    "BaseOpenAIChatCompletionClient._process_create_args",
    "BaseOpenAIChatCompletionClient._create_stream_chunks",
    "BaseOpenAIChatCompletionClient._create_stream_chunks_beta_client",
}


def snapshot() -> dict[str, Any]:
    """Every attribute of every module and class of AutoGen that is loaded, by `<module>.<class>.<attribute>`."""
    modules = [module for name, module in sys.modules.items() if name.startswith("autogen_")]
    found = {f"{module.__name__}.{name}": value for module in modules for name, value in vars(module).items()}
    classes = {cls for cls in found.values() if isinstance(cls, type) and cls.__module__.startswith("autogen_")}
    for cls in classes:
        found |= {f"{cls.__module__}.{cls.__name__}.{name}": value for name, value in vars(cls).items()}
    return found


@pytest.mark.parametrize("options", [{}, {"redact": str.upper, "capture_token_ids": True}])
def test_uninstrument_puts_back_the_very_objects(options):
    AutoGenInstrumentor().instrument()  # loads all modules, so that they are in both snapshots
    AutoGenInstrumentor().uninstrument()
    before = snapshot()
    AutoGenInstrumentor().instrument(**options)
    replaced = {name for name, value in snapshot().items() if before.get(name) is not value}
    AutoGenInstrumentor().uninstrument()
    after = snapshot()

    assert {".".join(name.split(".")[-2:]) for name in replaced} >= REPLACED
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] is not after[name]] == []


def test_a_client_class_defined_while_instrumented_is_restored():
    AutoGenInstrumentor().instrument()

    class Mine(ReplayChatCompletionClient):
        async def create(self, *args: Any, **options: Any) -> Any:
            return await super().create(*args, **options)

    wrapped = vars(Mine)["create"]
    AutoGenInstrumentor().uninstrument()
    assert vars(Mine)["create"] is wrapped.__wrapped__


def test_instrumenting_twice_wraps_once(caplog):
    AutoGenInstrumentor().instrument()
    wrapped = BaseGroupChat.run_stream
    AutoGenInstrumentor().instrument()
    assert BaseGroupChat.run_stream is wrapped
    AutoGenInstrumentor().uninstrument()


def test_opentelemetry_instrument_finds_it():
    (entry,) = entry_points(group="opentelemetry_instrumentor", name="agl_autogen")
    assert entry.load() is AutoGenInstrumentor


def test_importing_the_package_does_not_load_autogen():
    code = "import sys, agl_autogen; sys.exit(any(name.startswith('autogen') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_wrong_pattern_is_refused_and_nothing_is_replaced():
    before = vars(BaseGroupChat)["run_stream"]
    with pytest.raises(ConfigError, match=r"roles\['planner'\]"):
        AutoGenInstrumentor().instrument(roles={"planner": "["})
    assert vars(BaseGroupChat)["run_stream"] is before


def test_a_patch_that_fails_undoes_the_earlier_ones(monkeypatch):
    """A later version of AutoGen may lack a method; it must not be left half patched."""
    AutoGenInstrumentor().instrument()  # loads all modules, so that they are in both snapshots
    AutoGenInstrumentor().uninstrument()
    monkeypatch.delattr(BaseOpenAIChatCompletionClient, "_create_stream_chunks_beta_client")
    before = snapshot()

    with pytest.raises(AttributeError, match="_create_stream_chunks_beta_client"):
        AutoGenInstrumentor().instrument()

    after = snapshot()
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] is not after[name]] == []


async def chat_with(**options: Any) -> ReadableSpan:
    """The span of one call, with AutoGen instrumented with `options`."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    AutoGenInstrumentor().instrument(tracer_provider=provider, **options)
    try:
        await ReplayChatCompletionClient(["yes"], model_info=MODEL_INFO).create([])
    finally:
        AutoGenInstrumentor().uninstrument()
    return only(exporter.get_finished_spans(), "chat")


@pytest.mark.parametrize(
    ("switch", "variable", "captured"),
    [(None, None, True), (None, "false", False), (False, "true", False), (True, "false", True)],
)
async def test_content_is_captured_unless_switched_off(monkeypatch, switch, variable, captured):
    if variable is not None:
        monkeypatch.setenv("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT", variable)
    found = attributes(await chat_with(capture_content=switch))
    assert ("gen_ai.input.messages" in found) is captured
    assert ("gen_ai.output.messages" in found) is captured
    assert found["gen_ai.response.finish_reasons"] == ("stop",)
