"""Content is left out or redacted, on our spans and on AutoGen's."""

from collections.abc import Callable
from typing import Any

import pytest
from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_core.tools import FunctionTool
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from agl.content.filter import use_redaction
from agl.errors import ConfigError
from agl_autogen import AutoGenInstrumentor
from tests.autogen.conftest import MakeClient, SwitchOn
from tests.autogen.scripted import agent, calls
from tests.autogen.span_tree import attributes, only

SECRET = "sesame"
TellAll = Callable[..., Any]


def redact(text: str) -> str:
    return text.replace(SECRET, "***")


def left(spans: InMemorySpanExporter) -> str:
    """All text that an exporter sends."""
    return "\n".join(span.to_json() for span in spans.get_finished_spans())


async def take(code: str) -> str:
    raise ValueError(f"wrong code {code}")


@pytest.fixture
def tell_all(spans: InMemorySpanExporter, client: MakeClient, switch_on: SwitchOn) -> TellAll:
    """A run in which every text has the secret, and a tool and a model call fail with it; the message bus is traced.

    Its options are those of the instrumentor.
    """

    async def run(**options: Any) -> None:
        switch_on(message_bus=True, **options)
        tool = FunctionTool(take, description=f"Takes {SECRET}.")
        first = agent("first", calls("take", code=SECRET), f"FAIL {SECRET}.", tools=[tool], reflect_on_tool_use=True)
        failing = AssistantAgent("failing", client("failing"), system_message=SECRET)
        spans.clear()
        with pytest.raises(RuntimeError):
            await RoundRobinGroupChat([first, failing], max_turns=2).run(task=SECRET)

    return run


async def test_every_text_is_redacted_before_it_is_on_a_span(spans, tell_all: TellAll):
    await tell_all(redact=redact)
    assert "***" in left(spans)
    assert SECRET not in left(spans)
    tool = only(spans.get_finished_spans(), "execute_tool take")
    assert tool.status.description == "ValueError: wrong code ***"
    assert attributes(tool)["gen_ai.tool.description"] == "Takes ***."
    assert "wrong code ***" in str(dict(tool.events[0].attributes or {})["exception.stacktrace"])
    assert attributes(only(spans.get_finished_spans(), "chat failing"))["error.type"] == "BadRequestError"


async def test_without_redact_the_instrumentor_uses_that_of_the_process(spans, tell_all: TellAll):
    use_redaction(redact)  # like a later `agl.init(redact=...)`
    try:
        await tell_all()
    finally:
        use_redaction(None)
    assert "***" in left(spans)
    assert SECRET not in left(spans)


async def test_without_captured_content_autogens_spans_have_none_either(spans, tell_all: TellAll):
    await tell_all(capture_content=False)
    assert SECRET not in left(spans)
    assert only(spans.get_finished_spans(), "execute_tool take").status.description == "ValueError"


async def test_with_content_everything_is_there(spans, tell_all: TellAll):
    """Shows that the tests above could find the secret."""
    await tell_all()
    assert left(spans).count(SECRET) > 10


async def test_redaction_does_not_apply_to_token_ids(spans, switch_on: SwitchOn, client):
    switch_on(redact=lambda text: "", capture_token_ids=True)
    executor = AssistantAgent("executor", client("executor"))
    spans.clear()
    await executor.run(task="How many mugs?")
    span = attributes(only(spans.get_finished_spans(), "chat executor"))
    assert span["agl.response.token_ids"] and span["agl.prompt.token_ids"]
    assert "mugs" not in str(span["gen_ai.input.messages"])


def test_a_redact_that_is_not_callable_is_refused():
    with pytest.raises(ConfigError, match="redact is 'x'"):
        AutoGenInstrumentor().instrument(redact="x")
