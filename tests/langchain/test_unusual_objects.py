"""Values that are not JSON, and handlers that are copied."""

import copy
import logging
import pickle
import threading
from typing import Any

import numpy as np
import pytest
from langchain_core.language_models import FakeListChatModel
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import StructuredTool
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pydantic import BaseModel, ConfigDict

from agl_langchain import AglCallbackHandler
from tests.autogen.span_tree import attributes, named, only


class Locked(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)
    lock: Any


class NoText(Exception):
    def __str__(self) -> str:
        return self.args[5]

    __repr__ = __str__


CIRCULAR: dict[str, Any] = {}
CIRCULAR["self"] = CIRCULAR


@pytest.mark.parametrize(
    "value", [{(1, 2): 3}, {np.int64(3): 1}, Locked(lock=threading.Lock()), CIRCULAR, NoText(), "half \ud83d"]
)
def test_a_tool_may_return_anything(
    instrumented: InMemorySpanExporter, caplog: pytest.LogCaptureFixture, value: Any
) -> None:
    StructuredTool.from_function(lambda q: value, name="look", description="d").invoke({"q": "x"})

    assert attributes(only(instrumented.get_finished_spans(), "execute_tool look"))["gen_ai.tool.call.result"]


def test_a_run_may_fail_with_an_exception_without_text(instrumented: InMemorySpanExporter) -> None:
    def fail(_: object) -> None:
        raise NoText

    with pytest.raises(NoText):
        RunnableLambda(fail, name="step").invoke(None)

    span = only(instrumented.get_finished_spans(), "invoke_workflow step")
    assert (span.status.status_code.name, span.status.description) == ("ERROR", "NoText: <NoText without text>")


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda handler: pickle.loads(pickle.dumps(handler))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_a_copied_handler_records_as_before_and_once(spans: InMemorySpanExporter, copied: Any) -> None:
    handler = AglCallbackHandler(roles={"writer": "wri.*"}, capture_content=False)
    model = FakeListChatModel(responses=["Seven."], callbacks=[handler])
    chain = RunnableLambda(lambda _: copied(model).invoke("hello"), name="write")
    chain.invoke(None, copied({"callbacks": [handler]}))

    (chat,) = named(spans.get_finished_spans(), "chat")
    assert attributes(chat)["agl.role"] == "writer"
    assert "gen_ai.input.messages" not in attributes(chat)


def test_a_handler_whose_redact_cannot_be_pickled_keeps_content_in_the_process(
    memory: InMemorySpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    memory.clear()
    handler = pickle.loads(pickle.dumps(AglCallbackHandler(redact=lambda text: "***")))
    FakeListChatModel(responses=["Seven."]).invoke("Ada", {"callbacks": [handler]})

    assert "gen_ai.input.messages" not in attributes(only(memory.get_finished_spans(), "chat"))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "records no content" in record.getMessage()
