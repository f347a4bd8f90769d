"""The callback handler: what LangChain reports of a run becomes its span."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.messages import BaseMessage, ToolMessage
from langchain_core.outputs import LLMResult
from langchain_core.tools import ToolException
from opentelemetry.trace import TracerProvider

from agl import semconv
from agl.content.filter import ContentFilter
from agl.content.redaction import Redact
from agl.failsafe import log_failure
from agl.role_map import RoleMap
from agl_langchain._messages import input_messages, prompt_messages, retrieved, to_json, tool_result
from agl_langchain._recorder import Recorder, Start

Arguments = ParamSpec("Arguments")
Event = Callable[Concatenate["AglCallbackHandler", Arguments], None]


def _event(record: Event[Arguments]) -> Event[Arguments]:
    """The boundary to the agent: an event that cannot be recorded is logged."""
    failed = f"LangChain's {record.__name__} was not recorded"

    @functools.wraps(record)
    def guarded(handler: "AglCallbackHandler", /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        try:
            record(handler, *args, **kwargs)
        except Exception as error:  # noqa: BLE001 - as `never_raises`, which costs every event of an agent more
            log_failure(failed, error)

    return guarded


class AglCallbackHandler(BaseCallbackHandler):
    """Spans for chains, LangGraph nodes, models, tools and retrievers, with the role of the agent on each call.

    One handler serves any number of runs at once, in threads and in tasks. Telemetry never raises into the agent: what
    goes wrong is logged. Alone, without `LangChainInstrumentor`, it puts nothing on the requests: a call is joined
    with the gateway's account of it by response id, which LangChain shows only where it does not stream.
    """

    run_inline = True  # else every event of an async run goes through a thread, in which nothing can be made current

    def __init__(
        self,
        *,
        roles: Mapping[str, str] | None = None,
        capture_content: bool | None = None,
        redact: Redact | None = None,
        tracer_provider: TracerProvider | None = None,
    ) -> None:
        """`roles` maps a role to a regular expression over names of nodes, agents and chains.

        `capture_content` says whether messages, tool arguments, results and what errors say go on the spans; None
        leaves it to `OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT`, and without that they do. `redact` is given
        each text of these before it is on a span, and gives back what may leave the process (see
        `agl.content.filter`); None leaves it to `agl.init`.

        Raises ConfigError for a pattern that is no regular expression, or a `redact` that is no function.
        """
        self._recorder = Recorder(RoleMap(roles), ContentFilter.of(capture_content, redact), tracer_provider)

    @_event
    def on_chain_start(self, serialized: dict[str, Any] | None, inputs: Any, **event: Any) -> None:
        self._recorder.open_chain(Start.of(serialized, event))

    @_event
    def on_chain_end(self, outputs: Any, *, run_id: UUID, **event: Any) -> None:
        self._recorder.close(run_id)

    @_event
    def on_chain_error(self, error: BaseException, *, run_id: UUID, **event: Any) -> None:
        self._recorder.close(run_id, error)

    @_event
    def on_chat_model_start(self, serialized: dict[str, Any], messages: list[list[BaseMessage]], **event: Any) -> None:
        start = Start.of(serialized, event)
        self._recorder.open_call(
            semconv.OPERATION_CHAT, start, lambda: {semconv.GEN_AI_INPUT_MESSAGES: to_json(input_messages(messages[0]))}
        )

    @_event
    def on_llm_start(self, serialized: dict[str, Any], prompts: list[str], **event: Any) -> None:
        start = Start.of(serialized, event)
        self._recorder.open_call(
            semconv.OPERATION_TEXT_COMPLETION,
            start,
            lambda: {semconv.GEN_AI_INPUT_MESSAGES: to_json(prompt_messages(prompts[0]))},
        )

    @_event
    def on_llm_new_token(self, token: Any, *, run_id: UUID, **event: Any) -> None:
        self._recorder.answer_begins(run_id)

    @_event
    def on_stream_event(self, event: Any, *, run_id: UUID, **kwargs: Any) -> None:
        self._recorder.answer_begins(run_id)

    @_event
    def on_llm_end(self, response: LLMResult, *, run_id: UUID, **event: Any) -> None:
        self._recorder.close_call(run_id, response)

    @_event
    def on_llm_error(self, error: BaseException, *, run_id: UUID, **event: Any) -> None:
        """`response` holds what a stream had said by then."""
        self._recorder.close_call(run_id, event.get("response") or LLMResult(generations=[]), error)

    @_event
    def on_tool_start(self, serialized: dict[str, Any] | None, input_str: str, **event: Any) -> None:
        inputs = event.get("inputs")
        arguments = input_str if inputs is None else inputs
        self._recorder.open_tool(
            Start.of(serialized, event | {"name": None}),  # the tool's own name, not that of the run
            event.get("tool_call_id"),
            lambda: {semconv.GEN_AI_TOOL_CALL_ARGUMENTS: to_json(arguments)},
        )

    @_event
    def on_tool_end(self, output: Any, *, run_id: UUID, **event: Any) -> None:
        failed = isinstance(output, ToolMessage) and output.status == "error"
        error = ToolException("the tool turned its error into an answer") if failed else None
        self._recorder.close(
            run_id, error, content=lambda: {semconv.GEN_AI_TOOL_CALL_RESULT: to_json(tool_result(output))}
        )

    @_event
    def on_tool_error(self, error: BaseException, *, run_id: UUID, **event: Any) -> None:
        self._recorder.close(run_id, error)

    @_event
    def on_retriever_start(self, serialized: dict[str, Any] | None, query: str, **event: Any) -> None:
        start = Start.of(serialized, event)
        self._recorder.open_retrieval(start, lambda: {semconv.GEN_AI_RETRIEVAL_QUERY_TEXT: query})

    @_event
    def on_retriever_end(self, documents: Sequence[Document], *, run_id: UUID, **event: Any) -> None:
        self._recorder.close(
            run_id, content=lambda: {semconv.GEN_AI_RETRIEVAL_DOCUMENTS: to_json(retrieved(documents))}
        )

    @_event
    def on_retriever_error(self, error: BaseException, *, run_id: UUID, **event: Any) -> None:
        self._recorder.close(run_id, error)
