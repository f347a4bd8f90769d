"""A fake SGLang engine: ids are in `sglext` after the answer, prompts in `input_ids`."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.core.fake_engine import PROMPT_IDS, USAGE, WORDS, logprob, rendered, token_id

Json = dict[str, Any]


@dataclass
class SglangEngine:
    """`app` to serve; `seen` are the bodies of chats and completions."""

    seen: list[Json] = field(default_factory=list)

    @property
    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/completions", self._complete, methods=["POST"]),
                Route("/tokenize", self._tokenize, methods=["POST"]),
                Route("/detokenize", self._detokenize, methods=["POST"]),
            ]
        )

    async def _chat(self, request: Request) -> Response:
        body = await request.json()
        self.seen.append(body)
        if not body.get("stream"):
            choices = [_choice(body, number) for number in range(body.get("n") or 1)]
            whole = _envelope(body, "chat.completion", choices) | {"usage": _usage(body), "metadata": None}
            return JSONResponse(whole | _sglext(body))
        if body.get("return_token_ids"):
            message = "return_token_ids is not supported with streaming on /v1/chat/completions."
            return JSONResponse({"object": "error", "message": message, "type": "BadRequest", "code": 400}, 400)
        return StreamingResponse(_events(body), media_type="text/event-stream")

    async def _complete(self, request: Request) -> Response:
        body = await request.json()
        self.seen.append(body)
        logprobs = {"tokens": WORDS, "token_logprobs": [logprob(0, place) for place in range(3)]}
        choice: Json = {"index": 0, "text": "".join(WORDS), "logprobs": logprobs, "finish_reason": "stop"}
        if body.get("return_token_ids"):
            choice |= {"prompt_token_ids": PROMPT_IDS, "token_ids": [token_id(0, place) for place in range(3)]}
        return JSONResponse(_envelope(body, "text_completion", [choice]) | {"usage": USAGE})

    async def _tokenize(self, request: Request) -> JSONResponse:
        return JSONResponse({"tokens": rendered((await request.json())["messages"]), "count": 1, "max_model_len": -1})

    async def _detokenize(self, request: Request) -> JSONResponse:
        body = await request.json()
        assert body["skip_special_tokens"] is False
        return JSONResponse({"text": "".join(f"<{token}>" for token in body["tokens"])})


def _envelope(body: Json, kind: str, choices: list[Json]) -> Json:
    return {"id": "sglang-1", "object": kind, "created": 1, "model": body["model"], "choices": choices}


def _usage(body: Json) -> Json:
    answers = 3 * (body.get("n") or 1)
    return {"prompt_tokens": len(body.get("input_ids") or PROMPT_IDS), "completion_tokens": answers}


def _sglext(body: Json) -> Json:
    fields: Json = {}
    if body.get("return_input_ids_in_sglext"):
        fields["input_ids"] = body.get("input_ids") or PROMPT_IDS
    if body.get("return_output_ids_in_sglext"):
        numbers = range(body.get("n") or 1)
        fields["output_ids"] = [[token_id(number, place) for place in range(3)] for number in numbers]
    return {"sglext": fields} if fields else {}


def _logprobs(body: Json, number: int, places: range) -> Json | None:
    if not body.get("logprobs"):
        return None
    return {
        "content": [
            {"token": WORDS[place], "bytes": [], "logprob": logprob(number, place), "top_logprobs": []}
            for place in places
        ]
    }


def _choice(body: Json, number: int) -> Json:
    message = {"role": "assistant", "content": "".join(WORDS), "reasoning_content": None, "tool_calls": None}
    finish = {"finish_reason": "stop", "matched_stop": token_id(number, 2)}
    return {"index": number, "message": message, "logprobs": _logprobs(body, number, range(3))} | finish


def _events(body: Json) -> Iterator[bytes]:
    for chunk in _chunks(body):
        yield b"data: " + json.dumps(chunk).encode() + b"\n\n"
    yield b"data: [DONE]\n\n"


def _chunks(body: Json) -> Iterator[Json]:
    kind, numbers = "chat.completion.chunk", range(body.get("n") or 1)
    for place in range(3):
        for number in numbers:
            delta = {"role": "assistant" if place == 0 else None, "content": WORDS[place]}
            logprobs = _logprobs(body, number, range(place, place + 1))
            yield _envelope(body, kind, [{"index": number, "delta": delta, "logprobs": logprobs}])
    for number in numbers:
        finish = {"finish_reason": "stop", "matched_stop": token_id(number, 2)}
        yield _envelope(body, kind, [{"index": number, "delta": {}, "logprobs": None} | finish])
    if tokens := _sglext(body):
        yield _envelope(body, kind, []) | tokens
    if (body.get("stream_options") or {}).get("include_usage"):
        yield _envelope(body, kind, []) | {"usage": _usage(body)}
