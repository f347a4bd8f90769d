"""The span tree of a graph of two roles, alone and in many concurrent runs."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.language_models import FakeListChatModel
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import StructuredTool, ToolException
from langgraph.errors import GraphInterrupt
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

import agl
from agl_langchain import AglCallbackHandler
from tests.autogen.span_tree import attributes, only, tree
from tests.langchain.agents import STOCK, two_async_roles, two_roles
from tests.langchain.conftest import MakeModel
from tests.langchain.modes import ASYNC_MODES, MODES, Mode
from tests.stepped_clock import step_back


def test_calls_keep_their_order_when_the_clock_steps_back(
    instrumented: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_back(monkeypatch)
    model = FakeListChatModel(responses=["a", "b"])
    for _ in range(2):
        model.invoke("hi")
    times = [moment or 0 for span in instrumented.get_finished_spans() for moment in (span.start_time, span.end_time)]
    assert times == sorted(times) and len(times) == 4


QUESTION = {"messages": [("user", "How many mugs?")]}

GOLDEN = """\
invoke_workflow LangGraph
  invoke_agent planner [planner]
    chat tiny [planner]
  invoke_agent executor [executor]
    think
      chat tiny [executor]
    execute_tool stock [executor]
      look into the database"""


@pytest.mark.parametrize(
    ("make_agent", "mode"),
    [*((two_roles, mode) for mode in MODES), *((two_async_roles, mode) for mode in ASYNC_MODES)],
)
async def test_a_graph_of_two_roles_and_a_tool(
    make_agent: Callable[[Any], Any], mode: Mode, instrumented: InMemorySpanExporter, make_model: MakeModel
) -> None:
    await mode(make_agent(make_model()), QUESTION, {})

    spans = instrumented.get_finished_spans()
    assert tree(spans) == GOLDEN
    assert attributes(only(spans, "invoke_workflow LangGraph")) == {
        "gen_ai.operation.name": "invoke_workflow",
        "gen_ai.workflow.name": "LangGraph",
    }
    assert attributes(only(spans, "invoke_agent planner")) == {
        "gen_ai.operation.name": "invoke_agent",
        "gen_ai.agent.name": "planner",
        "agl.role": "planner",
    }
    assert attributes(only(spans, "execute_tool stock")) == {
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.tool.name": "stock",
        "gen_ai.tool.call.id": "call_1",
        "gen_ai.tool.call.arguments": '{"item":"mug"}',
        "gen_ai.tool.call.result": '"7"',
        "agl.role": "executor",
    }
    assert {span.kind for span in spans if not span.name.startswith("chat")} == {SpanKind.INTERNAL}


async def test_two_hundred_concurrent_agents_do_not_mix_spans(
    instrumented: InMemorySpanExporter, make_model: MakeModel
) -> None:
    agent = two_async_roles(make_model())

    async def run(number: int) -> None:
        async with agl.rollout(f"r{number}", group_id="g"):
            await agent.ainvoke({"messages": [("user", f"Question {number}")]})

    await asyncio.gather(*(run(number) for number in range(200)))

    rollouts: dict[object, list[ReadableSpan]] = {}
    for span in instrumented.get_finished_spans():
        rollouts.setdefault(attributes(span)["agl.rollout.id"], []).append(span)
    indented = "\n".join("  " + line for line in GOLDEN.splitlines())
    assert len(rollouts) == 200
    for number in range(200):
        spans = rollouts[f"r{number}"]
        assert tree(spans) == f"agl.rollout\n{indented}"
        assert len({span.context.trace_id for span in spans}) == 1
        asked = [json.loads(str(attributes(span)["gen_ai.input.messages"]))[0] for span in spans if "chat" in span.name]
        assert {message["parts"][0]["content"] for message in asked} == {f"Question {number}"}


@pytest.mark.parametrize("mode", MODES)
async def test_a_tool_error_marks_the_tool_and_every_run_that_fails_with_it(
    mode: Mode, instrumented: InMemorySpanExporter
) -> None:
    def use(_: Any) -> Any:
        return STOCK.invoke({"item": "car"})

    async def ause(_: Any) -> Any:
        return await STOCK.ainvoke({"item": "car"})

    with pytest.raises(LookupError):
        await mode(RunnableLambda(use, ause, name="shop"), None, {})

    spans = instrumented.get_finished_spans()
    assert tree(spans) == ("invoke_workflow shop ERROR\n  execute_tool stock ERROR\n    look into the database ERROR")
    tool = only(spans, "execute_tool stock")
    assert attributes(tool)["error.type"] == "LookupError"
    assert attributes(only(spans, "invoke_workflow shop"))["error.type"] == "LookupError"


def test_a_tool_that_returns_its_error_is_marked(instrumented: InMemorySpanExporter) -> None:
    def refuse(item: str) -> str:
        """Refuse."""
        raise ToolException(f"no {item}")

    refusing = StructuredTool.from_function(refuse, name="refuse", handle_tool_error=True)
    call = {"name": "refuse", "args": {"item": "mug"}, "id": "c1", "type": "tool_call"}

    assert refusing.invoke(call, {"run_name": "renamed"}).content == "no mug"

    span = only(instrumented.get_finished_spans(), "execute_tool refuse")
    assert span.status.status_code is StatusCode.ERROR
    assert attributes(span)["error.type"] == "ToolException"
    assert attributes(span)["gen_ai.tool.call.result"] == '"no mug"'


async def test_a_cancelled_run_ends_with_its_type(instrumented: InMemorySpanExporter, make_model: MakeModel) -> None:
    task = asyncio.create_task(two_async_roles(make_model()).ainvoke({"messages": [("user", "SLOW")]}))
    await asyncio.sleep(0.15)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0.05)  # LangChain reports the end in a task of its own

    spans = instrumented.get_finished_spans()
    assert tree(spans) == (
        "invoke_workflow LangGraph ERROR\n  invoke_agent planner [planner] ERROR\n    chat tiny [planner] ERROR"
    )
    assert {attributes(span)["error.type"] for span in spans} == {"CancelledError"}


def test_an_interrupt_is_not_an_error(instrumented: InMemorySpanExporter) -> None:
    def ask(_: Any) -> Any:
        raise GraphInterrupt()

    with pytest.raises(GraphInterrupt):
        RunnableLambda(ask, name="ask").invoke(None)

    span = only(instrumented.get_finished_spans(), "invoke_workflow ask")
    assert span.status.is_unset and "error.type" not in attributes(span)


def test_a_retrieval_has_its_query_and_documents(instrumented: InMemorySpanExporter) -> None:
    from langchain_core.documents import Document
    from langchain_core.retrievers import BaseRetriever

    class Shelf(BaseRetriever):
        def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
            if query == "cars":
                raise LookupError(query)
            return [Document("A mug.", id="d1", metadata={"shelf": 3})]

    Shelf().invoke("mugs")
    with pytest.raises(LookupError):
        Shelf().invoke("cars")

    found, missed = instrumented.get_finished_spans()
    assert (found.name, found.kind) == ("retrieval Shelf", SpanKind.CLIENT)
    assert attributes(found) == {
        "gen_ai.operation.name": "retrieval",
        "gen_ai.retrieval.query.text": "mugs",
        "gen_ai.retrieval.documents": '[{"id":"d1","content":"A mug.","metadata":{"shelf":3}}]',
    }
    assert attributes(missed)["error.type"] == "LookupError"


def test_a_chain_of_steps_is_a_workflow_over_its_steps(instrumented: InMemorySpanExporter) -> None:
    from langchain_core.output_parsers import StrOutputParser
    from langchain_core.prompts import ChatPromptTemplate

    chain = ChatPromptTemplate.from_template("{q}") | FakeListChatModel(responses=["Seven."]) | StrOutputParser()

    assert chain.invoke({"q": "How many?"}) == "Seven."

    assert tree(instrumented.get_finished_spans()) == (
        "invoke_workflow RunnableSequence\n  ChatPromptTemplate\n  chat\n  StrOutputParser"
    )


def test_the_handler_alone_makes_the_same_tree(spans: InMemorySpanExporter, make_model: MakeModel) -> None:
    two_roles(make_model()).invoke(QUESTION, {"callbacks": [AglCallbackHandler()]})

    assert tree(spans.get_finished_spans()) == GOLDEN
