"""Switching on and off."""

import subprocess
import sys
from importlib.metadata import entry_points
from typing import Any

import pytest
from autogen_agentchat.agents import _base_chat_agent
from autogen_agentchat.teams import BaseGroupChat
from autogen_agentchat.teams._group_chat import _chat_agent_container
from autogen_agentchat.teams._group_chat._sequential_routed_agent import SequentialRoutedAgent
from autogen_core.logging import LLMCallEvent
from autogen_core.models import ChatCompletionClient
from autogen_ext.models.openai import BaseOpenAIChatCompletionClient
from autogen_ext.models.replay import ReplayChatCompletionClient
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from agl.errors import ConfigError
from agl_autogen import AutoGenInstrumentor
from tests.autogen.conftest import MODEL_INFO
from tests.autogen.span_tree import attributes, only

OWNERS: list[Any] = [
    BaseGroupChat,
    SequentialRoutedAgent,
    _base_chat_agent,
    _base_chat_agent.BaseChatAgent,
    _chat_agent_container,
    ChatCompletionClient,
    BaseOpenAIChatCompletionClient,
    ReplayChatCompletionClient,
    LLMCallEvent,
]


def snapshot() -> list[dict[str, Any]]:
    return [dict(vars(owner)) for owner in OWNERS]


def test_uninstrument_puts_back_the_very_objects():
    before = snapshot()
    AutoGenInstrumentor().instrument()
    replaced = [
        (owner, name)
        for owner, old in zip(OWNERS, before, strict=True)
        for name, value in vars(owner).items()
        if old.get(name) is not value
    ]
    AutoGenInstrumentor().uninstrument()

    assert len(replaced) == 14
    for old, new in zip(before, snapshot(), strict=True):
        assert old.keys() == new.keys()
        assert all(old[name] is new[name] for name in old)


def test_a_client_class_defined_between_is_put_back_too():
    AutoGenInstrumentor().instrument()

    class Mine(ReplayChatCompletionClient):
        async def create(self, *args: Any, **options: Any) -> Any:
            return await super().create(*args, **options)

    wrapped = vars(Mine)["create"]
    AutoGenInstrumentor().uninstrument()
    assert vars(Mine)["create"] is wrapped.__wrapped__


def test_switching_on_twice_wraps_once(caplog):
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


async def chat_with(**options: Any) -> ReadableSpan:
    """The span of one call, made with the instrumentation switched on with `options`."""
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
