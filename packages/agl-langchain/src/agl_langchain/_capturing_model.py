"""A chat model that requests token ids from its engine, captures them for the span, and hides them from the agent."""

from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from contextlib import aclosing, closing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.messages import BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_openai.chat_models.base import BaseChatOpenAI

from agl.failsafe import never_raises
from agl.tokens.capture import Capture, Json, RequestedFields, is_empty_chunk, strip
from agl_langchain._run import OPEN_RUNS, active_run

Chunks = Generator[ChatGenerationChunk, None, None]
AsyncChunks = AsyncGenerator[ChatGenerationChunk, None]
RunManager = CallbackManagerForLLMRun | AsyncCallbackManagerForLLMRun | None
Value = TypeVar("Value")

_FAILURE = "token ids of a model answer are not on its span"
_NOTHING = RequestedFields(token_ids=False, logprobs=False)


@dataclass(slots=True)
class _CapturedRequest:
    """The current request: the capture of its response, and which captured fields the agent itself asked for."""

    captured: Capture
    streams: bool
    asked: RequestedFields = _NOTHING

    def ask(self, payload: Json) -> None:
        """Request ids and logprobs as well, except from the Responses API (no `messages`), which has neither."""
        if "messages" not in payload:
            return
        extra = payload.get("extra_body") or {}
        self.asked = RequestedFields(bool(extra.get("return_token_ids")), bool(payload.get("logprobs")))
        payload["extra_body"] = {**extra, "return_token_ids": True}
        payload["logprobs"] = True

    def capture(self, response: Any) -> None:
        """Capture a whole response, and hide what the agent did not ask for.

        `response` is JSON, or an object of the `openai` package, on which the agent sees logprobs but no ids.
        """
        if isinstance(response, dict):
            self.captured.add_whole(response)
            strip(response, self.asked)
            return
        self.captured.add_whole(response.model_dump(exclude={"choices": {"__all__": {"message"}}}, warnings=False))
        for choice in () if self.asked.logprobs else response.choices:
            choice.logprobs = None

    def capture_chunk(self, chunk: Json) -> bool:
        """Capture a chunk of a stream, or an event that contains one. True: the engine sends it without capture too."""
        answer = chunk.get("chunk") or chunk
        self.captured.add(answer)
        if not self.asked.logprobs and str(chunk.get("type")).startswith("logprobs."):
            return False
        return not (strip(answer, self.asked) and is_empty_chunk(answer))


_REQUEST: ContextVar[_CapturedRequest | None] = ContextVar("agl_langchain_request", default=None)
_MANAGER: ContextVar[RunManager] = ContextVar("agl_langchain_manager", default=None)
"""Callback manager of the current call: LangChain passes none to `_stream` if `generate` streams."""


class CapturingChatModel(BaseChatOpenAI):
    """See `capture_token_ids`. The run of a request is determined at its start and kept in a context variable."""

    def _generate_with_cache(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        with _current(_MANAGER, run_manager):
            return super()._generate_with_cache(messages, stop, run_manager, **kwargs)

    async def _agenerate_with_cache(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        with _current(_MANAGER, run_manager):
            return await super()._agenerate_with_cache(messages, stop, run_manager, **kwargs)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        with _current(_REQUEST, _request(run_manager, streams=False)):
            return super()._generate(messages, stop, run_manager, **kwargs)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        with _current(_REQUEST, _request(run_manager, streams=False)):
            return await super()._agenerate(messages, stop, run_manager, **kwargs)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        request = _request(run_manager, streams=True)
        with closing(cast(Chunks, super()._stream(messages, stop, run_manager, **kwargs))) as chunks:
            while True:
                with _current(_REQUEST, request):  # for this step only: the caller shares the context
                    chunk = next(chunks, None)
                if chunk is None:
                    return
                yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        request = _request(run_manager, streams=True)
        async with aclosing(cast(AsyncChunks, super()._astream(messages, stop, run_manager, **kwargs))) as chunks:
            while True:
                with _current(_REQUEST, request):
                    chunk = await anext(chunks, None)
                if chunk is None:
                    return
                yield chunk

    def _get_request_payload(self, *args: Any, **kwargs: Any) -> Json:
        payload = super()._get_request_payload(*args, **kwargs)
        request = _REQUEST.get()
        if request is not None:
            with never_raises("a model request does not ask for token ids"):
                request.ask(payload)
        return payload

    def _create_chat_result(self, response: Any, *args: Any, **kwargs: Any) -> ChatResult:
        request = _REQUEST.get()
        if request is not None and not request.streams:  # else it is the sum of a stream whose chunks were captured
            with never_raises(_FAILURE):
                request.capture(response)
        return super()._create_chat_result(response, *args, **kwargs)

    def _convert_chunk_to_generation_chunk(self, chunk: Json, *args: Any, **kwargs: Any) -> ChatGenerationChunk | None:
        request = _REQUEST.get()
        is_for_agent = True
        if request is not None:
            with never_raises(_FAILURE):
                is_for_agent = request.capture_chunk(chunk)
        return super()._convert_chunk_to_generation_chunk(chunk, *args, **kwargs) if is_for_agent else None


def _request(manager: RunManager, *, streams: bool) -> _CapturedRequest | None:
    """None if no handler of ours traces the call."""
    manager = manager or _MANAGER.get()
    run = OPEN_RUNS.get(manager.run_id) if manager else active_run()
    if run is None or run.call is None:
        return None
    run.call.captured = run.call.captured or Capture()  # a model with retries makes several requests in one run
    return _CapturedRequest(run.call.captured, streams)


@contextmanager
def _current(variable: ContextVar[Value], value: Value) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
