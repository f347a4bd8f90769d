"""A small engine in the shape of vLLM 0.32, over a real socket: it samples from a script and remembers what it saw.

The last message steers it: `SLOW` streams for seconds, `TOOL` answers with a tool call, `BREAK` drops the connection
half-way, `GARBAGE` answers something that is not JSON, `HOLD` waits for `released`. Its chat template writes a
character a token (`rendered`).
"""

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

Json = dict[str, Any]

WORDS = ["Hello", " there", "!"]
PROMPT_IDS = [1, 2, 70_000]
MODELS = ("writer@3", "base")
USAGE = {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
"""Usage of a call with one choice and the prompt `PROMPT_IDS`."""
TOOL_CALL = {"id": "call_1", "type": "function", "function": {"name": "search", "arguments": '{"x": 1}'}}


TURN = 7
"""Starts what is said by a role; the last token of an answer ends it."""


def rendered(messages: list[Json]) -> list[int]:
    """What /tokenize makes of `messages`, up to where the next answer starts. A chat says `PROMPT_IDS` instead."""
    return [token for message in messages for token in (TURN, *map(ord, message["content"]), END)] + [TURN]


def token_id(choice: int, position: int) -> int:
    return 100 + 1000 * choice + position


def logprob(choice: int, position: int) -> float:
    return -0.5 - choice - position / 8


END = token_id(0, len(WORDS) - 1)


@dataclass
class FakeEngine:
    """`app` to serve; `seen` are the request bodies, `headers` theirs, `streams_cut` the streams a client left.

    The first answers are `failures`, while there are any: a status each. `takes_tokens` is what it does with the prompt
    of a chat in tokens: it takes it, knows nothing of it, or refuses the request.
    """

    models: tuple[str, ...] = MODELS
    seen: list[Json] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    streams_cut: int = 0
    failures: list[int] = field(default_factory=list)
    takes_tokens: Literal["yes", "ignores", "refuses"] = "yes"
    tokenizes: bool = True
    released: threading.Event = field(default_factory=threading.Event)

    @property
    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/completions", self._complete, methods=["POST"]),
                Route("/v1/embeddings", self._embed, methods=["POST"]),
                Route("/v1/models", self._models),
                *([Route("/tokenize", self._tokenize, methods=["POST"])] if self.tokenizes else []),
            ]
        )

    async def _models(self, _: Request) -> JSONResponse:
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]})

    async def _chat(self, request: Request) -> Response:
        body = await self._note(request)
        return await self._answer(request, ChatAnswer(body, body["messages"][-1]["content"], _id(request)))

    async def _complete(self, request: Request) -> Response:
        body = await self._note(request)
        return await self._answer(request, TextAnswer(body, body["prompt"], _id(request)))

    async def _embed(self, request: Request) -> Response:
        body = await self._note(request)
        texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
        data = [{"object": "embedding", "index": index, "embedding": [0.5, 1.0]} for index in range(len(texts))]
        return JSONResponse({"object": "list", "model": body["model"], "data": data, "usage": USAGE})

    async def _tokenize(self, request: Request) -> JSONResponse:
        body = await request.json()
        return JSONResponse({"count": 1, "max_model_len": 1000, "tokens": rendered(body["messages"])})

    async def _note(self, request: Request) -> Json:
        self.seen.append(await request.json())
        self.headers.append(dict(request.headers))
        return self.seen[-1]

    async def _answer(self, request: Request, answer: "Answer") -> Response:
        if answer.body["model"] not in self.models:
            error = {"message": f"The model `{answer.body['model']}` does not exist.", "type": "NotFoundError"}
            return JSONResponse({"error": error | {"param": "model", "code": 404}}, 404)
        given = (answer.body.get("kv_transfer_params") or {}).get("prompt_token_ids")
        if given and self.takes_tokens == "refuses":
            return JSONResponse({"error": {"message": "extra inputs are not permitted"}}, 400)
        answer.given = given if self.takes_tokens == "yes" else None
        if self.failures:
            return JSONResponse({"error": {"message": "not now"}}, self.failures.pop(0))
        while answer.steer == "HOLD" and not self.released.is_set():
            await asyncio.sleep(0.005)
        if answer.steer == "GARBAGE":
            return Response("<html>", media_type="text/html")
        if answer.body.get("stream"):
            return StreamingResponse(self._events(answer), media_type="text/event-stream")
        if answer.steer == "SLOW":
            while not await request.is_disconnected():
                await asyncio.sleep(0.01)
            self.streams_cut += 1
        return JSONResponse(answer.whole(), headers={"x-engine": "fake"})

    async def _events(self, answer: "Answer") -> AsyncIterator[bytes]:
        try:
            for chunk in answer.chunks():
                yield b"data: " + json.dumps(chunk).encode() + b"\n\n"
                if answer.steer == "BREAK" and chunk["choices"][0].get("logprobs"):
                    raise ConnectionAbortedError("as scripted")
                await asyncio.sleep(0.03 if answer.steer == "SLOW" else 0)
            yield b"data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.streams_cut += 1
            raise


@dataclass
class Answer:
    """What is answered to `body`; `steer` is its last message or prompt."""

    body: Json
    steer: str
    response_id: str
    given: list[int] | None = None
    """The prompt in tokens."""

    @property
    def words(self) -> list[str]:
        return WORDS * 100 if self.steer == "SLOW" else WORDS

    @property
    def numbers(self) -> range:
        return range(self.body.get("n") or 1)

    @property
    def finish_reason(self) -> str:
        return "tool_calls" if self.steer == "TOOL" else "stop"

    def whole(self) -> Json:
        raise NotImplementedError

    def chunks(self) -> list[Json]:
        raise NotImplementedError

    def envelope(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": self.response_id,
            "object": kind,
            "created": 1,
            "model": self.body["model"],
            "choices": choices,
        }

    def usage_chunk(self, kind: str) -> list[Json]:
        wanted = (self.body.get("stream_options") or {}).get("include_usage")
        return [self.envelope(kind, []) | {"usage": self.usage()}] if wanted else []

    def usage(self) -> Json:
        prompt, answers = len(self.given or PROMPT_IDS), len(self.words) * len(self.numbers)
        return {"prompt_tokens": prompt, "completion_tokens": answers, "total_tokens": prompt + answers}

    def ids(self, choice: int, positions: range) -> Json:
        wanted = self.body.get("return_token_ids")
        return {"token_ids": [token_id(choice, position) for position in positions]} if wanted else {}

    def prompt_ids(self) -> Json:
        return {"prompt_token_ids": self.given or PROMPT_IDS} if self.body.get("return_token_ids") else {}


@dataclass
class ChatAnswer(Answer):
    def whole(self) -> Json:
        choices = [self._choice(number) for number in self.numbers]
        return self.envelope("chat.completion", choices) | {"usage": self.usage()} | self.prompt_ids()

    def chunks(self) -> list[Json]:
        chunks = [
            self._chunk(number, {"role": "assistant", "content": ""}) | self.prompt_ids() for number in self.numbers
        ]
        for position in range(len(self.words)):
            for number in self.numbers:
                chunks += self._token_chunk(number, position)
        return chunks + self.usage_chunk("chat.completion.chunk")

    def _choice(self, number: int) -> Json:
        tool = self.steer == "TOOL"
        message = {"role": "assistant", "content": None if tool else "".join(self.words)}
        positions = range(len(self.words))
        return {
            "index": number,
            "message": message | ({"tool_calls": [TOOL_CALL]} if tool else {}),
            "logprobs": self._logprobs(number, positions),
            "finish_reason": self.finish_reason,
            **self.ids(number, positions),
        }

    def _token_chunk(self, number: int, position: int) -> list[Json]:
        """As vLLM does: a token that says nothing yet (a tool call being read) is sent only where ids are wanted."""
        last = position == len(self.words) - 1
        delta: Json = {"content": self.words[position]}
        if self.steer == "TOOL":
            delta = {"tool_calls": [{"index": 0, **TOOL_CALL}]} if position == 1 else {}
        if not delta and not last and not self.body.get("return_token_ids"):
            return []
        return [self._chunk(number, delta, range(position, position + 1), self.finish_reason if last else None)]

    def _chunk(self, number: int, delta: Json, positions: range = range(0), finish: str | None = None) -> Json:
        choice = {
            "index": number,
            "delta": delta,
            "logprobs": self._logprobs(number, positions),
            "finish_reason": finish,
        }
        return self.envelope("chat.completion.chunk", [choice | (self.ids(number, positions) if positions else {})])

    def _logprobs(self, number: int, positions: range) -> Json | None:
        if not self.body.get("logprobs") or not positions:
            return None
        return {
            "content": [
                {"token": self.words[position], "logprob": logprob(number, position), "bytes": None, "top_logprobs": []}
                for position in positions
            ]
        }


@dataclass
class TextAnswer(Answer):
    def whole(self) -> Json:
        positions = range(len(self.words))
        choices = [self._choice(number, positions, self.finish_reason) for number in self.numbers]
        return self.envelope("text_completion", choices) | {"usage": self.usage()}

    def chunks(self) -> list[Json]:
        last = len(self.words) - 1
        chunks = [
            self.envelope(
                "text_completion",
                [self._choice(number, range(position, position + 1), self.finish_reason if position == last else None)],
            )
            for position in range(len(self.words))
            for number in self.numbers
        ]
        return chunks + self.usage_chunk("text_completion")

    def _choice(self, number: int, positions: range, finish: str | None) -> Json:
        texts = [self.words[position] for position in positions]
        logprobs = {
            "tokens": texts,
            "token_logprobs": [logprob(number, position) for position in positions],
            "top_logprobs": None,
            "text_offset": [],
        }
        return {
            "index": number,
            "text": "".join(texts),
            "logprobs": logprobs if self.body.get("logprobs") is not None else None,
            "finish_reason": finish,
            **self.ids(number, positions),
            **(self.prompt_ids() if positions.start == 0 else {}),
        }


def _id(request: Request) -> str:
    return f"chatcmpl-{request.headers.get('x-request-id', 'none')}"
