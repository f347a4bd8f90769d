"""Starlette app that serves the OpenAI API from a sampler."""

import asyncio
import functools
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from transformers import PreTrainedTokenizerBase

from agl.errors import AglError
from agl.server.receiving import long_work
from agl_trainer.data.chat import ChatTemplate, ChatTemplateError, special_tokens
from agl_trainer.data.tool_call import forced_start
from agl_trainer.engine.http.choice_stream import ChoiceStream, cancel_all, merge_deltas
from agl_trainer.engine.http.detokenizer import decode
from agl_trainer.engine.http.openai_request import (
    BodyT,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    RequestError,
    TokenizeRequest,
    parse_request,
)
from agl_trainer.engine.http.openai_response import AnyBuilder, ChatResponseBuilder, CompletionResponseBuilder, Json
from agl_trainer.engine.protocol import (
    ContextLengthError,
    EngineStoppedError,
    PromptError,
    Sampler,
    SamplingParams,
    UnknownModelError,
)

logger = logging.getLogger(__name__)

_CLIENT_CLOSED_REQUEST = 499
_SERVER_ERROR = 500

_STATUS: tuple[tuple[type[Exception], int, str | None], ...] = (
    (RequestError, 400, None),
    (ChatTemplateError, 400, None),
    (PromptError, 400, None),
    (ContextLengthError, 400, "context_length_exceeded"),
    (UnknownModelError, 404, "model_not_found"),
    (EngineStoppedError, 503, "engine_stopped"),
    (Exception, 500, "engine_error"),
)
"""HTTP status and OpenAI error code of each error class; the first match applies."""


def engine_app(
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    *,
    served_name: str,
    max_model_len: int,
    default_max_tokens: int,
) -> Starlette:
    """The app. Defaults of a request: model `served_name`, and at most `default_max_tokens` tokens."""
    api = _Api(sampler, tokenizer, served_name, max_model_len, default_max_tokens)
    routes = [
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/completions", api.completions, methods=["POST"]),
        Route("/v1/models", api.models),
        Route("/tokenize", api.tokenize, methods=["POST"]),
        Route("/detokenize", api.detokenize, methods=["POST"]),
        Route("/health", api.health),
    ]
    return Starlette(
        routes=routes,
        exception_handlers={AglError: _error_response, HTTPException: _no_route, Exception: _error_response},
    )


@dataclass
class _Api:
    """The endpoints. They share one event loop, which is the only user of the tokenizer."""

    sampler: Sampler
    tokenizer: PreTrainedTokenizerBase
    served_name: str
    max_model_len: int
    default_max_tokens: int

    def __post_init__(self) -> None:
        self._template = ChatTemplate(self.tokenizer)
        self._special_ids = special_tokens(self.tokenizer)
        self._token_text = functools.cache(lambda token_id: decode(self.tokenizer, [token_id], special=True))

    async def chat(self, request: Request) -> Response:
        body = await _parse(request, ChatRequest)
        must_call = body.tool_choice == "required" or body.forced_tool is not None
        start = forced_start(body.forced_tool) if must_call else ""
        choices = self._submit(body, [self._chat_ids(body) + self._template.encode(start)])
        name = f"chatcmpl-{_request_id(request)}"
        return await _respond(request, ChatResponseBuilder(name, body, choices, self._token_text, answer_start=start))

    async def completions(self, request: Request) -> Response:
        body = await _parse(request, CompletionRequest)
        choices = self._submit(body, [self._completion_ids(prompt) for prompt in body.prompt])
        name = f"cmpl-{_request_id(request)}"
        return await _respond(request, CompletionResponseBuilder(name, body, choices, self._token_text))

    async def tokenize(self, request: Request) -> Response:
        body = await _parse(request, TokenizeRequest)
        ids = self._template.prompt_ids(body.turns(), body.tool_definitions())
        return JSONResponse({"count": len(ids), "max_model_len": self.max_model_len, "tokens": ids})

    async def detokenize(self, request: Request) -> Response:
        ids = self._check_vocabulary((await _parse(request, DetokenizeRequest)).tokens)
        return JSONResponse({"prompt": decode(self.tokenizer, ids, special=True)})

    async def models(self, _: Request) -> Response:
        about = {"object": "model", "created": int(time.time()), "owned_by": "agl", "max_model_len": self.max_model_len}
        return JSONResponse({"object": "list", "data": [{"id": name, **about} for name in self.sampler.models()]})

    async def health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    def _completion_ids(self, prompt: str | list[int]) -> list[int]:
        ids = prompt if isinstance(prompt, list) else self.tokenizer(prompt)["input_ids"]
        if not ids:
            raise RequestError("prompt: got no token", "prompt")
        return self._check_vocabulary(ids)

    def _chat_ids(self, body: ChatRequest) -> list[int]:
        if body.prompt_ids is not None:
            return self._check_vocabulary(body.prompt_ids)
        return self._template.prompt_ids(body.turns(), body.offered_tools)

    def _check_vocabulary(self, ids: list[int]) -> list[int]:
        """Return `ids`. Raises RequestError if the vocabulary lacks one of them."""
        unknown = next((token_id for token_id in ids if token_id >= len(self.tokenizer)), None)
        if unknown is not None:
            raise RequestError(f"prompt: got token id {unknown}, the vocabulary has {len(self.tokenizer)}", "prompt")
        return ids

    def _submit(self, body: ChatRequest | CompletionRequest, prompts: Sequence[list[int]]) -> list[ChoiceStream]:
        """Start `n` sequences for each prompt. If one is rejected, the others are cancelled."""
        choices: list[ChoiceStream] = []
        try:
            for prompt in prompts:
                for number in range(body.n):
                    choices.append(self._start(body, prompt, len(choices), number))
        except BaseException:
            cancel_all(choices)
            raise
        return choices

    def _start(self, body: ChatRequest | CompletionRequest, prompt: list[int], index: int, number: int) -> ChoiceStream:
        stops = [stop for stop in body.stop if stop not in self._special_ids]
        special = {self._special_ids[stop] for stop in body.stop if stop in self._special_ids}
        params = SamplingParams(
            max_tokens=self._max_answer_tokens(body, len(prompt)),
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=max(body.top_k, 0),
            min_p=body.min_p,
            seed=None if body.seed is None else body.seed + number,
            stop_token_ids=self._template.stop_token_ids | special,
            top_logprobs=body.alternatives_per_token,
            deliver_at_end=not body.stream and not stops,
        )
        generation = self.sampler.submit(prompt, body.model or self.served_name, params)
        return ChoiceStream(index, prompt, generation, self.tokenizer, stops, params.stop_token_ids)

    def _max_answer_tokens(self, body: ChatRequest | CompletionRequest, prompt_length: int) -> int:
        """Limit of the answer in tokens. Raises ContextLengthError if the requested number does not fit the context."""
        room = self.max_model_len - prompt_length
        wanted = body.token_limit
        if room < (wanted or 1):
            raise ContextLengthError(
                f"this model's maximum context length is {self.max_model_len} tokens: the prompt has {prompt_length}"
                f" and {wanted or 'at least 1'} are requested for the answer; shorten the messages or lower max_tokens"
            )
        return wanted or min(room, self.default_max_tokens)


class _EventStream(StreamingResponse):
    """A response as server-sent events. Sampling stops as soon as the client disconnects, not at garbage collection."""

    def __init__(self, response: AnyBuilder) -> None:
        self._response = response
        self._events = _events(response)
        super().__init__(self._events, media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self._events):
                await super().__call__(scope, receive, send)
        finally:
            cancel_all(self._response.choices)


async def _events(response: AnyBuilder) -> AsyncGenerator[str]:
    try:
        async with aclosing(merge_deltas(response.choices)) as deltas:
            async for delta in deltas:
                for chunk in response.chunks(delta):
                    yield _event(chunk)
        for chunk in response.final_chunks():
            yield _event(chunk)
    except AglError as error:
        yield _event(_error_body(error)[1])
    yield "data: [DONE]\n\n"


def _event(data: Json) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def _respond(request: Request, response: AnyBuilder) -> Response:
    """The response; status 499 if the client disconnects before it is complete."""
    if response.is_streamed:
        return _EventStream(response)
    whole, gone = asyncio.ensure_future(_whole(response)), asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({whole, gone}, return_when=asyncio.FIRST_COMPLETED)
        return whole.result() if whole.done() else Response(status_code=_CLIENT_CLOSED_REQUEST)
    finally:
        cancel_all(response.choices)
        whole.cancel()
        gone.cancel()
        await asyncio.gather(whole, gone, return_exceptions=True)


async def _whole(response: AnyBuilder) -> JSONResponse:
    async with aclosing(merge_deltas(response.choices)) as deltas:
        async for _ in deltas:
            pass
    return JSONResponse(response.body())


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _parse(request: Request, model: type[BodyT]) -> BodyT:
    body = await request.body()
    return await long_work(len(body), _parse_body, body, model)


def _parse_body(body: bytes, model: type[BodyT]) -> BodyT:
    try:
        data = json.loads(body)
        json.dumps(data, ensure_ascii=False).encode()  # fails for lone surrogates, which no tokenizer accepts
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the request body is not valid JSON: {error}") from error
    return parse_request(model, data)


def _request_id(request: Request) -> str:
    return request.headers.get("x-request-id") or uuid.uuid4().hex


async def _error_response(_: Request, error: Exception) -> JSONResponse:
    status, body = _error_body(error)
    return JSONResponse(body, status)


async def _no_route(request: Request, error: Exception) -> JSONResponse:
    """Response to an unknown path or method."""
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {request.url.path}"
    return JSONResponse(_error_object(message, "invalid_request_error"), error.status_code, error.headers)


def _error_body(error: Exception) -> tuple[int, Json]:
    """HTTP status and body of an error."""
    status, code = next((status, code) for kind, status, code in _STATUS if isinstance(error, kind))
    if status >= _SERVER_ERROR:
        logger.error("request failed: %s", error)
    kind = "server_error" if status >= _SERVER_ERROR else "invalid_request_error"
    return status, _error_object(str(error), kind, error.param if isinstance(error, RequestError) else None, code)


def _error_object(message: str, kind: str, param: str | None = None, code: str | None = None) -> Json:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
