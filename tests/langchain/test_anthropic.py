"""Spans of a chat model with an API other than OpenAI's, in every mode."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from anyio.from_thread import start_blocking_portal
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from langchain.agents import create_agent
from tests.autogen.span_tree import attributes, named, only, tree
from tests.langchain.agents import STOCK
from tests.langchain.anthropic_server import AnthropicServer, running_anthropic
from tests.langchain.modes import EVERY_MODE, MODES, STREAMS, Mode

QUESTION = {"messages": [("user", "How many mugs?")]}


@pytest.fixture
def claude() -> Iterator[AnthropicServer]:
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(running_anthropic()) as server:
        yield server


def chat(server: AnthropicServer, **options: Any) -> ChatAnthropic:
    return ChatAnthropic(model_name="claude-tiny", base_url=server.base_url, api_key="none", max_retries=0, **options)  # type: ignore[call-arg]


def messages(span: Any, which: str) -> Any:
    return json.loads(str(attributes(span)[f"gen_ai.{which}.messages"]))


@pytest.mark.parametrize("mode", MODES)
async def test_a_call_has_the_attributes_of_the_conventions(
    mode: Mode, instrumented: InMemorySpanExporter, claude: AnthropicServer
) -> None:
    await mode(chat(claude, temperature=0.5), [HumanMessage("How many mugs?")], {})

    found = attributes(only(instrumented.get_finished_spans(), "chat claude-tiny"))
    said = [{"role": "assistant", "parts": [{"type": "text", "content": "Seven mugs."}], "finish_reason": "end_turn"}]
    assert json.loads(str(found.pop("gen_ai.output.messages"))) == said
    assert json.loads(str(found.pop("gen_ai.input.messages")))[0]["parts"][0]["content"] == "How many mugs?"
    assert found.pop("gen_ai.request.max_tokens", None) is not None
    assert found.pop("gen_ai.response.id", None) == (
        None if mode in STREAMS else "msg_1"
    )  # LangChain drops it in streams
    assert found == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "anthropic",
        "gen_ai.request.model": "claude-tiny",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.response.model": "claude-tiny-1",
        "gen_ai.response.finish_reasons": ("end_turn",),
        "gen_ai.usage.input_tokens": 11,
        "gen_ai.usage.output_tokens": 3,
    }


@pytest.mark.parametrize("mode", EVERY_MODE)
async def test_an_agent_over_it_is_one_tree_with_its_tool(
    mode: Mode, instrumented: InMemorySpanExporter, claude: AnthropicServer
) -> None:
    await mode(create_agent(chat(claude), [STOCK], name="keeper"), QUESTION, {})

    spans = [span for span in instrumented.get_finished_spans() if not span.name.startswith("anthropic.")]  # its own
    assert tree(spans).splitlines() == [
        "invoke_agent keeper [keeper]",
        "  model",
        "    chat claude-tiny [keeper]",
        "  tools",
        "    execute_tool stock [keeper]",
        "      look into the database",
        "  model",
        "    chat claude-tiny [keeper]",
    ]
    first, second = named(spans, "chat claude-tiny")
    call = {"type": "tool_call", "id": "toolu_1", "name": "stock", "arguments": {"item": "mug"}}
    thought = {"type": "reasoning", "content": "They ask for mugs."}
    assert messages(first, "output") == [{"role": "assistant", "parts": [thought, call], "finish_reason": "tool_use"}]
    assert [message["role"] for message in messages(second, "input")] == ["user", "assistant", "tool"]
    assert messages(second, "input")[1]["parts"] == [thought, call]
    assert messages(second, "input")[2]["parts"] == [{"type": "tool_call_response", "id": "toolu_1", "response": "7"}]
    assert "stock" in str(attributes(first)["gen_ai.tool.definitions"])


@pytest.mark.parametrize("mode", MODES)
async def test_a_call_that_fails_is_marked(
    mode: Mode, instrumented: InMemorySpanExporter, claude: AnthropicServer
) -> None:
    with pytest.raises(anthropic.APIStatusError):
        await mode(chat(claude), "FAIL", {})

    span = only(instrumented.get_finished_spans(), "chat claude-tiny")
    assert span.status.status_code is StatusCode.ERROR and attributes(span)["error.type"] == "AnthropicOverloadedError"
