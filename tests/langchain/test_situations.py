"""Every kind of LangChain and LangGraph run in every mode: each has one span with the right parent."""

import asyncio
import operator
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.documents import Document
from langchain_core.exceptions import OutputParserException
from langchain_core.language_models import FakeListChatModel, FakeListLLM
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import JsonOutputParser, StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableConfig, RunnableGenerator, RunnableLambda, RunnableParallel
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode
from langgraph.types import Command, Send, interrupt
from opentelemetry import trace
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import agl
from tests.autogen.span_tree import attributes, named, only, tree
from tests.langchain.agents import STOCK, TRACER
from tests.langchain.modes import (
    ASYNC_MODES,
    EVERY_ASYNC_MODE,
    EVERY_MODE,
    MODES,
    Mode,
    abatch,
    ainvoke,
    batch,
    invoke,
)

MODEL = FakeListChatModel(responses=["Seven."])


class Shelf(BaseRetriever):
    def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
        return [Document("A mug.")]


class State(TypedDict, total=False):
    said: Annotated[list[str], operator.add]
    number: int


def answer(state: Any) -> dict[str, Any]:
    return {"said": [MODEL.invoke(str(state)).text]}


async def aanswer(state: Any) -> dict[str, Any]:
    return {"said": [(await MODEL.ainvoke(str(state))).text]}


def graph_of(*nodes: tuple[str, Any], **options: Any) -> Any:
    """A graph of `nodes` one after the other."""
    graph = StateGraph(State)
    for name, node in nodes:
        graph.add_node(name, node)
    for before, after in pairwise([START, *(name for name, _ in nodes), END]):
        graph.add_edge(before, after)
    return graph.compile(**options)


@pytest.mark.parametrize("mode", EVERY_MODE)
@pytest.mark.parametrize(
    ("runnable", "value", "expected"),
    [
        (RunnableLambda(str, name="chain"), "mug", "invoke_workflow chain"),
        (
            graph_of(("writer", answer)),
            {},
            "invoke_workflow LangGraph\n  invoke_agent writer [writer]\n    chat [writer]",
        ),
        (MODEL, "mug", "chat"),
        (FakeListLLM(responses=["Seven."]), "mug", "text_completion"),
        (STOCK, {"item": "mug"}, "execute_tool stock\n  look into the database"),
        (Shelf(), "mug", "retrieval Shelf"),
        (StrOutputParser(), AIMessage("Seven."), "invoke_workflow StrOutputParser"),
        (ChatPromptTemplate.from_template("{item}"), {"item": "mug"}, "invoke_workflow ChatPromptTemplate"),
    ],
    ids=["chain", "node", "chat model", "llm", "tool", "retriever", "parser", "prompt"],
)
async def test_every_run_type_in_every_mode(
    mode: Mode, runnable: Any, value: Any, expected: str, instrumented: InMemorySpanExporter
) -> None:
    with TRACER.start_as_current_span("around"):
        await mode(runnable, value, {})

    indented = "\n".join("  " + line for line in expected.splitlines())
    assert tree(instrumented.get_finished_spans()) == f"around\n{indented}"


@pytest.mark.parametrize("mode", EVERY_MODE)
async def test_branches_of_a_parallel_are_its_children(mode: Mode, instrumented: InMemorySpanExporter) -> None:
    second = (MODEL | StrOutputParser()).with_config(run_name="second")

    await mode(RunnableParallel(first=MODEL, second=second), "How many?", {})

    lines = tree(instrumented.get_finished_spans()).splitlines()
    assert lines[0] == "invoke_workflow RunnableParallel<first,second>"
    # branches run concurrently, so their order varies
    assert sorted(lines[1:]) == sorted(["  chat", "  second", "    chat", "    StrOutputParser"])


@pytest.mark.parametrize("mode", EVERY_MODE)
async def test_a_subgraph_is_a_child_of_its_node(mode: Mode, instrumented: InMemorySpanExporter) -> None:
    team = graph_of(("writer", answer), ("critic", answer))

    await mode(graph_of(("team", team), ("editor", answer)), {}, {})

    assert tree(instrumented.get_finished_spans()) == (
        "invoke_workflow LangGraph\n"
        "  invoke_agent team [team]\n"
        "    LangGraph\n"
        "      invoke_agent writer [writer]\n"
        "        chat [writer]\n"
        "      invoke_agent critic [critic]\n"
        "        chat [critic]\n"
        "  invoke_agent editor [editor]\n"
        "    chat [editor]"
    )


@pytest.mark.parametrize(
    ("worker", "mode"), [*((answer, mode) for mode in EVERY_MODE), *((aanswer, mode) for mode in EVERY_ASYNC_MODE)]
)
async def test_each_send_of_a_fan_out_has_a_span(worker: Any, mode: Mode, instrumented: InMemorySpanExporter) -> None:
    graph = StateGraph(State)
    graph.add_node("worker", worker)
    graph.add_conditional_edges(
        START, lambda _: [Send("worker", {"number": number}) for number in range(5)], ["worker"]
    )
    graph.add_edge("worker", END)

    await mode(graph.compile(), {}, {})

    spans = instrumented.get_finished_spans()
    workers = named(spans, "invoke_agent worker")
    calls = named(spans, "chat")
    assert len(workers) == len(calls) == 5
    assert {call.parent.span_id for call in calls} == {span.context.span_id for span in workers}
    asked = sorted(str(attributes(call)["gen_ai.input.messages"]) for call in calls)
    assert all(f"'number': {number}" in text for number, text in enumerate(asked))


@pytest.mark.parametrize("mode", EVERY_MODE)
async def test_an_interrupt_and_its_resume_are_two_runs_without_a_failure(
    mode: Mode, instrumented: InMemorySpanExporter
) -> None:
    def ask(state: State) -> dict[str, Any]:
        MODEL.invoke("What shall I ask?")
        return {"said": [interrupt("Sure?")]}

    graph = graph_of(("asker", ask), ("writer", answer), checkpointer=InMemorySaver())
    config = {"configurable": {"thread_id": "1"}}

    await mode(graph, {}, config)
    assert tree(instrumented.get_finished_spans()) == (
        "invoke_workflow LangGraph\n  invoke_agent asker [asker]\n    chat [asker]"
    )
    instrumented.clear()
    await mode(graph, Command(resume="yes"), config)

    assert tree(instrumented.get_finished_spans()) == (
        "invoke_workflow LangGraph\n"
        "  invoke_agent asker [asker]\n"
        "    chat [asker]\n"
        "  invoke_agent writer [writer]\n"
        "    chat [writer]"
    )
    assert graph.get_state(config).values["said"][0] == "yes"


@pytest.mark.parametrize("mode", [invoke, ainvoke, batch, abatch])  # LangChain does not retry a stream
async def test_each_try_of_a_retry_has_a_span(mode: Mode, instrumented: InMemorySpanExporter) -> None:
    tries = iter([ValueError("no"), ValueError("no"), None])

    def ask(_: Any) -> str:
        if error := next(tries):
            raise error
        return MODEL.invoke("How many?").text

    await mode(RunnableLambda(ask, name="asker").with_retry(wait_exponential_jitter=False), 1, {})

    lines = [line.strip() for line in tree(instrumented.get_finished_spans()).splitlines()]
    assert lines[-4:] == ["asker ERROR", "asker ERROR", "asker", "chat"]


@pytest.mark.parametrize("mode", MODES)
async def test_a_fallback_is_a_sibling_of_the_failed_run(mode: Mode, instrumented: InMemorySpanExporter) -> None:
    def fail(_: Any) -> str:
        raise ValueError("no")

    second = RunnableLambda(lambda _: MODEL.invoke("How many?").text, name="second")

    await mode(RunnableLambda(fail, name="first").with_fallbacks([second]), 1, {})

    assert tree(instrumented.get_finished_spans()) == (
        "invoke_workflow RunnableWithFallbacks\n  first ERROR\n  second\n    chat"
    )


@pytest.mark.parametrize("mode", EVERY_MODE)
async def test_tool_calls_in_parallel_keep_their_ids_arguments_and_spans(
    mode: Mode, instrumented: InMemorySpanExporter
) -> None:
    calls = [{"name": "stock", "args": {"item": "mug"}, "id": f"c{number}", "type": "tool_call"} for number in range(4)]
    calls.append({"name": "stock", "args": {"item": "car"}, "id": "c4", "type": "tool_call"})
    graph = StateGraph(MessagesState)
    graph.add_node("tools", ToolNode([STOCK], handle_tool_errors=True))
    graph.add_edge(START, "tools")

    await mode(graph.compile(), {"messages": [AIMessage("", tool_calls=calls)]}, {})

    spans = instrumented.get_finished_spans()
    tools = {attributes(span)["gen_ai.tool.call.id"]: span for span in named(spans, "execute_tool stock")}
    inside = {span.parent.span_id for span in named(spans, "look into the database")}
    assert inside == {span.context.span_id for span in tools.values()} and len(tools) == 5
    assert {attributes(tools[f"c{number}"])["gen_ai.tool.call.result"] for number in range(4)} == {'"7"'}
    assert attributes(tools["c4"])["error.type"] == "LookupError"
    assert {span.status.is_unset for name, span in tools.items() if name != "c4"} == {True}


def test_a_parser_that_cannot_parse_ends_with_its_error(instrumented: InMemorySpanExporter) -> None:
    with pytest.raises(OutputParserException):
        (MODEL | JsonOutputParser()).with_config(run_name="count").invoke("How many?")

    spans = instrumented.get_finished_spans()
    assert tree(spans) == "invoke_workflow count ERROR\n  chat\n  JsonOutputParser ERROR"
    assert attributes(only(spans, "JsonOutputParser"))["error.type"] == "OutputParserException"


def test_an_abandoned_generator_ends_its_span(instrumented: InMemorySpanExporter) -> None:
    def count(_: Iterator[Any]) -> Iterator[int]:
        yield from range(100)

    items = RunnableGenerator(count).with_config(run_name="counter").stream("x")
    assert next(items) == 0
    items.close()

    assert tree(instrumented.get_finished_spans()) == "invoke_workflow counter"  # LangChain reports it as ended


@pytest.mark.parametrize("mode", ASYNC_MODES)
async def test_a_cancelled_tool_ends_its_span(mode: Mode, instrumented: InMemorySpanExporter) -> None:
    from langchain_core.tools import StructuredTool

    async def wait(item: str) -> str:
        """Wait."""
        await asyncio.sleep(60)
        return item

    tool = StructuredTool.from_function(coroutine=wait, name="wait")
    task = asyncio.create_task(mode(RunnableLambda(tool.ainvoke, name="waiter"), {"item": "x"}, {}))
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0.05)  # LangChain reports some ends in a task of its own

    found = attributes(only(instrumented.get_finished_spans(), "execute_tool wait"))
    assert found["error.type"] == "CancelledError"


def test_runs_started_in_worker_threads_are_children_of_the_run_in_their_config(
    instrumented: InMemorySpanExporter,
) -> None:
    names: list[str] = []

    def work(config: RunnableConfig) -> None:
        names.append(threading.current_thread().name)
        STOCK.invoke({"item": "mug"}, config)

    def share(_: Any, config: RunnableConfig) -> None:
        with ThreadPoolExecutor(4, "worker") as pool:
            list(pool.map(work, [config] * 8))

    with agl.rollout("r1"):
        RunnableLambda(share, name="share").invoke(None)

    tool = "    execute_tool stock\n      look into the database\n"
    assert all(name.startswith("worker") for name in names)
    assert tree(instrumented.get_finished_spans()) == ("agl.rollout\n  invoke_workflow share\n" + tool * 8).rstrip()


async def test_two_hundred_concurrent_runs_keep_parents_and_rollouts(
    instrumented: InMemorySpanExporter,
) -> None:
    """The fixture checks that no run stays open or current, and that nothing is logged."""
    graph = graph_of(("planner", aanswer), ("executor", aanswer))
    ways: list[Callable[..., Any]] = EVERY_ASYNC_MODE

    async def run(number: int) -> None:
        async with agl.rollout(f"r{number}"):
            await ways[number % len(ways)](graph, {"number": number}, {})
            assert trace.get_current_span().get_span_context().is_valid

    await asyncio.gather(*(run(number) for number in range(200)))

    rollouts: dict[object, list[Any]] = {}
    for span in instrumented.get_finished_spans():
        rollouts.setdefault(attributes(span)["agl.rollout.id"], []).append(span)
    assert len(rollouts) == 200
    assert {tree(spans) for spans in rollouts.values()} == {
        "agl.rollout\n"
        "  invoke_workflow LangGraph\n"
        "    invoke_agent planner [planner]\n"
        "      chat [planner]\n"
        "    invoke_agent executor [executor]\n"
        "      chat [executor]"
    }
    for number in range(200):
        asked = named(rollouts[f"r{number}"], "chat")[0]
        assert f"'number': {number}}}" in str(attributes(asked)["gen_ai.input.messages"])
