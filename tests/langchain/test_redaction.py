"""Redaction: the secret is on no span, and the agent's own data is unchanged."""

import json
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel, FakeListLLM
from langchain_core.messages import HumanMessage
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from agl.content.filter import use_redaction
from agl_langchain import AglCallbackHandler, LangChainInstrumentor
from tests.autogen.span_tree import attributes, only
from tests.langchain.agents import two_roles
from tests.langchain.conftest import MakeModel
from tests.langchain.modes import MODES, Mode
from tests.vllm_server import FakeVllmServer

SECRET = "Ada Lovelace"


def scrub(text: str) -> str:
    return text.replace(SECRET, "<name>")


def fails(text: str) -> str:
    raise LookupError(text)


class Register(BaseRetriever):
    def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
        return [Document(f"About {query}", id="d1", metadata={"title": query})]


@tool
def greet(name: str) -> str:
    """Greet someone."""
    if name.startswith("refuse"):
        raise ValueError(f"no greeting for {name}")
    return f"Hello {name}"


def everything_on(spans: tuple[ReadableSpan, ...]) -> str:
    """All text that an exporter sends, including `exception` events."""
    return "\n".join(span.to_json() for span in spans)


@pytest.mark.parametrize("mode", MODES)
async def test_no_text_of_a_run_is_on_a_span_unredacted(
    mode: Mode, spans: InMemorySpanExporter, server: FakeVllmServer, make_model: MakeModel
) -> None:
    server.words = (SECRET, " is", " welcome")
    config = {"callbacks": [AglCallbackHandler(redact=scrub)]}

    await mode(make_model(), [HumanMessage(f"Who is {SECRET}?")], config)
    await mode(FakeListLLM(responses=[SECRET]), f"Who is {SECRET}?", config)
    await mode(greet, {"name": SECRET}, config)
    await mode(Register(), SECRET, config)
    with pytest.raises(ValueError, match=SECRET):
        await mode(RunnableLambda(greet.invoke, greet.ainvoke, name="wish"), {"name": f"refuse {SECRET}"}, config)

    said = everything_on(spans.get_finished_spans())
    assert SECRET not in said
    chat = attributes(only(spans.get_finished_spans(), "chat tiny"))
    assert "Who is <name>?" in str(chat["gen_ai.input.messages"])
    assert "<name> is welcome" in str(chat["gen_ai.output.messages"])
    assert (
        "Hello <name>" in said
        and "About <name>" in said
        and '"exception.message": "no greeting for refuse <name>"' in said
    )
    assert SECRET in str(server.seen[0].body)  # the agent's data is unchanged


def test_the_instrumentor_takes_a_redaction(spans: InMemorySpanExporter) -> None:
    instrumentor = LangChainInstrumentor()
    instrumentor.instrument(redact=scrub)

    answer = FakeListChatModel(responses=[SECRET]).invoke(SECRET)
    instrumentor.uninstrument()

    assert answer.content == SECRET
    messages = json.loads(str(attributes(only(spans.get_finished_spans(), "chat"))["gen_ai.output.messages"]))
    assert messages[0]["parts"][0]["content"] == "<name>"


def test_a_handler_without_redact_uses_that_of_the_process(spans: InMemorySpanExporter) -> None:
    handler, stricter = AglCallbackHandler(), AglCallbackHandler(redact=lambda _: "-")
    use_redaction(scrub)  # like a later `agl.init(redact=...)`
    try:
        for one in (handler, stricter):
            FakeListChatModel(responses=[SECRET]).invoke(SECRET, {"callbacks": [one]})
    finally:
        use_redaction(None)
    said = [attributes(span)["gen_ai.output.messages"] for span in spans.get_finished_spans()]
    assert [json.loads(str(one))[0]["parts"][0]["content"] for one in said] == ["<name>", "-"]


def test_names_and_ids_are_not_redacted(spans: InMemorySpanExporter, make_model: MakeModel) -> None:
    question = {"messages": [("user", "How many mugs?")]}

    two_roles(make_model()).invoke(question, {"callbacks": [AglCallbackHandler(redact=lambda _: "-")]})

    found = attributes(only(spans.get_finished_spans(), "execute_tool stock"))
    assert found == {
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.tool.name": "stock",
        "gen_ai.tool.call.id": "call_1",
        "gen_ai.tool.call.arguments": '{"item":"-"}',
        "gen_ai.tool.call.result": '"-"',
        "agl.role": "executor",
    }


def test_if_redaction_fails_the_content_is_left_out_and_the_run_goes_on(
    spans: InMemorySpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    answer = FakeListChatModel(responses=[SECRET]).invoke(SECRET, {"callbacks": [AglCallbackHandler(redact=fails)]})

    assert answer.content == SECRET
    found = attributes(only(spans.get_finished_spans(), "chat"))
    assert found == {"gen_ai.operation.name": "chat", "gen_ai.provider.name": "fakelistchatmodel"}
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    assert "gen_ai.input.messages is left out" in caplog.text and SECRET not in caplog.text
    caplog.clear()


def test_a_second_handler_does_not_record_what_the_first_redacts(spans: InMemorySpanExporter) -> None:
    handlers = [AglCallbackHandler(redact=scrub), AglCallbackHandler()]

    FakeListChatModel(responses=[SECRET]).invoke(SECRET, {"callbacks": handlers})
    with pytest.raises(ValueError, match=SECRET):
        greet.invoke({"name": f"refuse {SECRET}"}, {"callbacks": handlers})

    assert SECRET not in everything_on(spans.get_finished_spans())


def test_without_captured_content_an_error_is_its_type(spans: InMemorySpanExporter) -> None:
    with pytest.raises(ValueError, match=SECRET):
        greet.invoke({"name": f"refuse {SECRET}"}, {"callbacks": [AglCallbackHandler(capture_content=False)]})

    span = only(spans.get_finished_spans(), "execute_tool greet")
    assert SECRET not in everything_on(spans.get_finished_spans())
    assert (span.status.description, attributes(span)["error.type"]) == ("ValueError", "ValueError")
    assert [dict(event.attributes or {}) for event in span.events] == [{"exception.type": "ValueError"}]
