"""A LangGraph agent of three roles in subgraphs, and the golden tree of its spans.

`python -m tests.langchain.three_roles` writes the golden file from a run of the agent.
"""

import operator
from pathlib import Path
from typing import Annotated, Any, TypedDict

from anyio.from_thread import start_blocking_portal
from langchain_core.documents import Document
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from openai import DefaultHttpxClient
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import agl
from agl.context import RolloutProcessor
from agl_langchain import AglCallbackHandler, capture_token_ids
from tests import golden
from tests.langchain.agents import STOCK
from tests.vllm_server import running_server

GOLDEN = Path(__file__).with_name("golden") / "three_roles.json"


class State(TypedDict, total=False):
    question: str
    notes: Annotated[list[str], operator.add]


class Shelf(BaseRetriever):
    def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
        return [Document("A mug.", id="d1")]


def three_roles(model: Any) -> Any:
    """`planner` is a node, `researcher` a graph of two steps, `critic` a graph with a nested graph."""
    chain = ChatPromptTemplate.from_template("{question}") | model | StrOutputParser()

    def plan(state: State) -> State:
        return {"notes": [chain.invoke(state)]}

    def look_up(state: State) -> State:
        return {"notes": [document.page_content for document in Shelf().invoke(state["question"])]}

    def count(state: State) -> State:
        answer = model.bind_tools([STOCK]).invoke(state["question"])
        return {"notes": [str(STOCK.invoke(call).content) for call in answer.tool_calls]}

    def judge(state: State) -> State:
        return {"notes": ["".join(chunk.text for chunk in model.stream(state["notes"][-1]))]}

    research = _in_order(("look up", look_up), ("count", count))
    review = _in_order(("critic", _in_order(("judge", judge))))
    return _in_order(("planner", plan), ("researcher", research), ("review", review))


def recorded() -> list[dict[str, Any]]:
    """The tree of one run of the agent in a rollout."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(RolloutProcessor())
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    handler = AglCallbackHandler(roles={"researcher": "look up|count", "critic": "judge"}, tracer_provider=provider)
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(running_server()) as server,
        DefaultHttpxClient() as client,
        agl.rollout("r1", group_id="g1"),
    ):
        settings: Any = {"temperature": 0.5, "max_tokens": 64, "http_client": client}
        model = ChatOpenAI(model="tiny", base_url=server.base_url, api_key="none", **settings)  # type: ignore[arg-type]
        three_roles(capture_token_ids(model)).invoke({"question": "How many?"}, {"callbacks": [handler]})
    return golden.described(exporter.get_finished_spans())


def _in_order(*nodes: tuple[str, Any]) -> Any:
    graph = StateGraph(State)
    before = START
    for name, node in nodes:
        graph.add_node(name, node)
        graph.add_edge(before, name)
        before = name
    graph.add_edge(before, END)
    return graph.compile()


if __name__ == "__main__":
    golden.write(GOLDEN, recorded())
