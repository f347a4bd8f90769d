"""The callback handler: translates LangChain's callbacks into the start and end of runs."""

import functools
import logging
import pickle
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
from agl.content.bounded import text_of
from agl.content.filter import ContentFilter
from agl.content.redaction import Redact
from agl.failsafe import log_failure
from agl.role_map import RoleMap
from agl_langchain._messages import input_messages, prompt_messages, retrieved, to_json, tool_result
from agl_langchain._recorder import RunRecorder, RunStart

logger = logging.getLogger("agl")

Arguments = ParamSpec("Arguments")
Callback = Callable[Concatenate["AglCallbackHandler", Arguments], None]


def _never_raising(callback: Callback[Arguments]) -> Callback[Arguments]:
    """`callback`, with its exceptions logged: telemetry must not stop the agent."""
    failure = f"LangChain's {callback.__name__} was not recorded"

    @functools.wraps(callback)
    def guarded(handler: "AglCallbackHandler", /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        try:
            callback(handler, *args, **kwargs)
        except Exception as error:  # noqa: BLE001 - like `never_raises`, which would take longer for each event
            log_failure(failure, error)

    return guarded


class AglCallbackHandler(BaseCallbackHandler):
    """Records chains, LangGraph nodes, model calls, tools and retrievers as spans, each call with its agent's role.

        agent.invoke(task, config={"callbacks": [AglCallbackHandler()]})

    One handler serves any number of concurrent runs, in threads and in tasks. It never raises into the agent: failures
    are logged. Without `LangChainInstrumentor`, requests carry no trace headers, and calls are joined with the spans of
    the gateway by response id, which LangChain does not report for streams.
    """

    run_inline = True  # else each event of an async run is handled in a thread, where no span can be made current

    def __init__(
        self,
        *,
        roles: Mapping[str, str] | None = None,
        capture_content: bool | None = None,
        redact: Redact | None = None,
        tracer_provider: TracerProvider | None = None,
    ) -> None:
        """All arguments are optional.

        `roles`: maps a role to a regular expression for names of nodes, agents and chains.
        `capture_content`: whether spans hold messages, tool arguments, tool results and error messages (default:
        `OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT`, else True).
        `redact`: a function from str to str, applied to each text of that content before it is recorded (default: the
        `redact` of `agl.init`; see `agl.content.filter`).
        `tracer_provider`: used in place of the global one.

        Raises ConfigError for an invalid regular expression or a `redact` that is not callable.
        """
        self._settings = {"roles": roles, "capture_content": capture_content, "redact": redact}
        self._recorder = RunRecorder(RoleMap(roles), ContentFilter.of(capture_content, redact), tracer_provider)

    def __copy__(self) -> "AglCallbackHandler":
        """The same handler: LangChain and its users copy configs and models, together with the handlers in them."""
        return self

    def __deepcopy__(self, memo: object) -> "AglCallbackHandler":
        return self

    def __reduce__(self) -> tuple[Callable[..., "AglCallbackHandler"], tuple[dict[str, Any]]]:
        """With the same settings, but the global tracer provider of the process that unpickles the handler."""
        return _restored, (_picklable(self._settings),)

    @_never_raising
    def on_chain_start(self, serialized: dict[str, Any] | None, inputs: Any, **event: Any) -> None:
        self._recorder.open_chain(RunStart.of(serialized, event))

    @_never_raising
    def on_chain_end(self, outputs: Any, *, run_id: UUID, **event: Any) -> None:
        self._recorder.close(run_id)

    @_never_raising
    def on_chain_error(self, error: BaseException, *, run_id: UUID, **event: Any) -> None:
        self._recorder.close(run_id, error)

    @_never_raising
    def on_chat_model_start(self, serialized: dict[str, Any], messages: list[list[BaseMessage]], **event: Any) -> None:
        self._recorder.open_call(
            semconv.OPERATION_CHAT,
            RunStart.of(serialized, event),
            lambda: {semconv.GEN_AI_INPUT_MESSAGES: to_json(input_messages(messages[0]))},
        )

    @_never_raising
    def on_llm_start(self, serialized: dict[str, Any], prompts: list[str], **event: Any) -> None:
        self._recorder.open_call(
            semconv.OPERATION_TEXT_COMPLETION,
            RunStart.of(serialized, event),
            lambda: {semconv.GEN_AI_INPUT_MESSAGES: to_json(prompt_messages(prompts[0]))},
        )

    @_never_raising
    def on_llm_new_token(self, token: Any, *, run_id: UUID, **event: Any) -> None:
        self._recorder.response_begins(run_id)

    @_never_raising
    def on_stream_event(self, event: Any, *, run_id: UUID, **kwargs: Any) -> None:
        self._recorder.response_begins(run_id)

    @_never_raising
    def on_llm_end(self, response: LLMResult, *, run_id: UUID, **event: Any) -> None:
        self._recorder.close_call(run_id, response)

    @_never_raising
    def on_llm_error(self, error: BaseException, *, run_id: UUID, **event: Any) -> None:
        """Of a stream that failed, `event["response"]` is the part received before."""
        self._recorder.close_call(run_id, event.get("response") or LLMResult(generations=[]), error)

    @_never_raising
    def on_tool_start(self, serialized: dict[str, Any] | None, input_str: str, **event: Any) -> None:
        inputs = event.get("inputs")
        self._recorder.open_tool(
            RunStart.of(serialized, event | {"name": None}),  # so that the tool's own name is used, not the run's
            event.get("tool_call_id"),
            lambda: {semconv.GEN_AI_TOOL_CALL_ARGUMENTS: to_json(input_str if inputs is None else inputs)},
        )

    @_never_raising
    def on_tool_end(self, output: Any, *, run_id: UUID, **event: Any) -> None:
        failed = isinstance(output, ToolMessage) and output.status == "error"
        error = ToolException("the tool turned its error into an answer") if failed else None
        self._recorder.close(
            run_id, error, content=lambda: {semconv.GEN_AI_TOOL_CALL_RESULT: to_json(tool_result(output))}
        )

    @_never_raising
    def on_tool_error(self, error: BaseException, *, run_id: UUID, **event: Any) -> None:
        self._recorder.close(run_id, error)

    @_never_raising
    def on_retriever_start(self, serialized: dict[str, Any] | None, query: str, **event: Any) -> None:
        self._recorder.open_retrieval(
            RunStart.of(serialized, event), lambda: {semconv.GEN_AI_RETRIEVAL_QUERY_TEXT: query}
        )

    @_never_raising
    def on_retriever_end(self, documents: Sequence[Document], *, run_id: UUID, **event: Any) -> None:
        self._recorder.close(
            run_id, content=lambda: {semconv.GEN_AI_RETRIEVAL_DOCUMENTS: to_json(retrieved(documents))}
        )

    @_never_raising
    def on_retriever_error(self, error: BaseException, *, run_id: UUID, **event: Any) -> None:
        self._recorder.close(run_id, error)


def _restored(settings: dict[str, Any]) -> AglCallbackHandler:
    return AglCallbackHandler(**settings)


def _picklable(settings: dict[str, Any]) -> dict[str, Any]:
    """`settings`; if `redact` cannot be pickled, content stays in the process instead."""
    try:
        pickle.dumps(settings["redact"])
    except Exception as error:  # noqa: BLE001 - pickle raises many types
        logger.warning("the pickled handler records no content: its redact cannot be pickled (%s)", text_of(error))
        return {**settings, "redact": None, "capture_content": False}
    return settings
