"""The engine's HTTP face: the OpenAI API over a sampler, as a Starlette app."""

import asyncio
import functools
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from transformers import PreTrainedTokenizerBase

from agl.errors import AglError
from agl_trainer.data.chat import ChatTemplate, ChatTemplateError, special_tokens
from agl_trainer.data.tool_call import forced_start
from agl_trainer.engine.http.answer import Answer, ChatAnswer, CompletionAnswer, Json
from agl_trainer.engine.http.choice import Choice, cancel, run
from agl_trainer.engine.http.detokenizer import decode
from agl_trainer.engine.http.validation import (
    BodyT,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    RequestError,
    TokenizeRequest,
    parse_request,
)
from agl_trainer.engine.protocol import (
    ContextLengthError,
    EngineStoppedError,
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
    (ContextLengthError, 400, "context_length_exceeded"),
    (UnknownModelError, 404, "model_not_found"),
    (EngineStoppedError, 503, "engine_stopped"),
    (Exception, 500, "engine_error"),
)
"""HTTP status and OpenAI error code of each error; the first match counts."""


def engine_app(
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    *,
    served_name: str,
    max_model_len: int,
    default_max_tokens: int,
) -> Starlette:
    """The app. `served_name` answers requests that name no model; `default_max_tokens` bounds those without a limit."""
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
        routes=routes, exception_handlers={AglError: _refuse, HTTPException: _refuse_route, Exception: _refuse}
    )


class _Api:
    """The endpoints. One event loop serves them all, and reads the tokenizer."""

    def __init__(
        self,
        sampler: Sampler,
        tokenizer: PreTrainedTokenizerBase,
        served_name: str,
        max_model_len: int,
        default_max_tokens: int,
    ) -> None:
        self._sampler = sampler
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer)
        self._served_name = served_name
        self._max_model_len = max_model_len
        self._default_max_tokens = default_max_tokens
        self._special_ids = special_tokens(tokenizer)
        self._token_text = functools.cache(lambda token_id: decode(tokenizer, [token_id], special=True))

    async def chat(self, request: Request) -> Response:
        asked = await _read(request, ChatRequest)
        must_call = asked.tool_choice == "required" or asked.forced_tool is not None
        start = forced_start(asked.forced_tool) if must_call else ""
        choices = self._submit(asked, [self._chat_ids(asked) + self._template.encode(start)])
        name = f"chatcmpl-{_request_id(request)}"
        return await _respond(request, ChatAnswer(name, asked, choices, self._token_text, answer_start=start))

    async def completions(self, request: Request) -> Response:
        asked = await _read(request, CompletionRequest)
        choices = self._submit(asked, [self._completion_ids(prompt) for prompt in asked.prompt])
        name = f"cmpl-{_request_id(request)}"
        return await _respond(request, CompletionAnswer(name, asked, choices, self._token_text))

    async def tokenize(self, request: Request) -> Response:
        asked = await _read(request, TokenizeRequest)
        ids = self._template.prompt_ids(asked.turns(), asked.tool_definitions())
        return JSONResponse({"count": len(ids), "max_model_len": self._max_model_len, "tokens": ids})

    async def detokenize(self, request: Request) -> Response:
        ids = self._known((await _read(request, DetokenizeRequest)).tokens)
        return JSONResponse({"prompt": decode(self._tokenizer, ids, special=True)})

    async def models(self, _: Request) -> Response:
        about = {"object": "model", "created": int(time.time()), "owned_by": "agl"}
        about["max_model_len"] = self._max_model_len
        return JSONResponse({"object": "list", "data": [{"id": name, **about} for name in self._sampler.models()]})

    async def health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    def _completion_ids(self, prompt: str | list[int]) -> list[int]:
        ids = prompt if isinstance(prompt, list) else self._tokenizer(prompt)["input_ids"]
        if not ids:
            raise RequestError("prompt: got no token", "prompt")
        return self._known(ids)

    def _chat_ids(self, asked: ChatRequest) -> list[int]:
        if asked.given_ids is not None:
            return self._known(asked.given_ids)
        return self._template.prompt_ids(asked.turns(), asked.offered_tools)

    def _known(self, ids: list[int]) -> list[int]:
        """`ids`, if the vocabulary has all of them."""
        unknown = next((token_id for token_id in ids if token_id >= len(self._tokenizer)), None)
        if unknown is not None:
            raise RequestError(f"prompt: got token id {unknown}, the vocabulary has {len(self._tokenizer)}", "prompt")
        return ids

    def _submit(self, asked: ChatRequest | CompletionRequest, prompts: Sequence[list[int]]) -> list[Choice]:
        """Start `n` sequences for each prompt; none is left running where one is refused."""
        choices: list[Choice] = []
        try:
            for prompt_ids in prompts:
                for number in range(asked.n):
                    choices.append(self._choice(asked, prompt_ids, len(choices), number))
        except BaseException:
            cancel(choices)
            raise
        return choices

    def _choice(self, asked: ChatRequest | CompletionRequest, prompt_ids: list[int], index: int, number: int) -> Choice:
        stops = [stop for stop in asked.stop if stop not in self._special_ids]
        special = {self._special_ids[stop] for stop in asked.stop if stop in self._special_ids}
        params = SamplingParams(
            max_tokens=self._answer_room(asked, len(prompt_ids)),
            temperature=asked.temperature,
            top_p=asked.top_p,
            seed=None if asked.seed is None else asked.seed + number,
            stop_token_ids=self._template.stop_token_ids | special,
            top_logprobs=asked.alternatives,
            at_once=not asked.stream and not stops,
        )
        generation = self._sampler.submit(prompt_ids, asked.model or self._served_name, params)
        return Choice(index, prompt_ids, generation, self._tokenizer, stops, params.stop_token_ids)

    def _answer_room(self, asked: ChatRequest | CompletionRequest, prompt_length: int) -> int:
        """Tokens the answer may have. Raises ContextLengthError where what was asked for does not fit."""
        room = self._max_model_len - prompt_length
        wanted = asked.answer_limit
        if room < (wanted or 1):
            raise ContextLengthError(
                f"this model's maximum context length is {self._max_model_len} tokens: the prompt has {prompt_length}"
                f" and {wanted or 'at least 1'} are asked for the answer; shorten the messages or lower max_tokens"
            )
        return wanted or min(room, self._default_max_tokens)


class _EventStream(StreamingResponse):
    """An answer as server-sent events. When the client goes, sampling ends at once, not at garbage collection."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._events = _events(answer)
        super().__init__(self._events, media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self._events):
                await super().__call__(scope, receive, send)
        finally:
            cancel(self._answer.choices)


async def _events(answer: Answer) -> AsyncGenerator[str]:
    try:
        async with aclosing(run(answer.choices)) as steps:
            async for step in steps:
                for chunk in answer.chunks(step):
                    yield _event(chunk)
        for chunk in answer.closing():
            yield _event(chunk)
    except AglError as error:
        yield _event(_error_body(error)[1])
    yield "data: [DONE]\n\n"


def _event(data: Json) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def _respond(request: Request, answer: Answer) -> Response:
    """The answer, or nothing where the client went before it was complete."""
    if answer.streamed:
        return _EventStream(answer)
    whole, gone = asyncio.ensure_future(_whole(answer)), asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({whole, gone}, return_when=asyncio.FIRST_COMPLETED)
        return whole.result() if whole.done() else Response(status_code=_CLIENT_CLOSED_REQUEST)
    finally:
        cancel(answer.choices)
        whole.cancel()
        gone.cancel()
        await asyncio.gather(whole, gone, return_exceptions=True)


async def _whole(answer: Answer) -> JSONResponse:
    async with aclosing(run(answer.choices)) as steps:
        async for _ in steps:
            pass
    return JSONResponse(answer.body())


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _read(request: Request, model: type[BodyT]) -> BodyT:
    try:
        data = json.loads(await request.body())
        json.dumps(data, ensure_ascii=False).encode()  # refuses half surrogate pairs, which no tokenizer reads
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the request body is not valid JSON: {error}") from error
    return parse_request(model, data)


def _request_id(request: Request) -> str:
    return request.headers.get("x-request-id") or uuid.uuid4().hex


async def _refuse(_: Request, error: Exception) -> JSONResponse:
    status, body = _error_body(error)
    return JSONResponse(body, status)


async def _refuse_route(request: Request, error: Exception) -> JSONResponse:
    """A path or method that the app does not have."""
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {request.url.path}"
    return JSONResponse(_body(message, "invalid_request_error"), error.status_code, error.headers)


def _error_body(error: Exception) -> tuple[int, Json]:
    """HTTP status and body of an error."""
    status, code = next((status, code) for kind, status, code in _STATUS if isinstance(error, kind))
    if status >= _SERVER_ERROR:
        logger.error("request failed: %s", error)
    kind = "server_error" if status >= _SERVER_ERROR else "invalid_request_error"
    return status, _body(str(error), kind, error.param if isinstance(error, RequestError) else None, code)


def _body(message: str, kind: str, param: str | None = None, code: str | None = None) -> Json:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
