"""A small server with vLLM's API on a real socket, which records its requests."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from aiohttp import web

USAGE = {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14}
PROMPT_IDS = [1, 2, 70000]
TOKEN_IDS = [301, 302, 303]
LOGPROBS = [-0.5, -0.25, -0.125]


@dataclass
class RecordedRequest:
    """A request's lower-case headers and JSON body, and the id of its response."""

    headers: dict[str, str]
    body: dict[str, Any]
    response_id: str


@dataclass
class FakeVllmServer:
    """Answers with `words`, or with a tool call with `arguments`. `seen` holds the requests in order."""

    base_url: str = ""
    words: Sequence[str] = ("Seven", " mugs", " TERMINATE")
    arguments: str = '{"item": "mug"}'
    seen: list[RecordedRequest] = field(default_factory=list)
    _numbers: Any = field(default_factory=count)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        headers = {name.lower(): value for name, value in request.headers.items()}
        seen = RecordedRequest(headers, body, f"chatcmpl-{next(self._numbers)}")
        self.seen.append(seen)
        if "FAIL" in body["messages"][-1]["content"]:
            return web.json_response({"error": {"message": "boom", "code": 400}}, status=400)
        await asyncio.sleep(0.3 if "SLOW" in body["messages"][-1]["content"] else 0.001)  # requests interleave
        answer = ResponseBuilder(seen, self.words, _tool_call(body, self.arguments))
        return await _stream(request, answer.chunks()) if body.get("stream") else web.json_response(answer.whole())

    async def complete(self, request: web.Request) -> web.Response:
        body = await request.json()
        headers = {name.lower(): value for name, value in request.headers.items()}
        seen = RecordedRequest(headers, body, f"cmpl-{next(self._numbers)}")
        self.seen.append(seen)
        choice = {"index": 0, "text": "".join(self.words), "finish_reason": "stop", "logprobs": None}
        answer = {"id": seen.response_id, "object": "text_completion", "created": 1, "model": body["model"]}
        return web.json_response({**answer, "choices": [choice], "usage": USAGE})


@asynccontextmanager
async def running_server() -> AsyncIterator[FakeVllmServer]:
    server = FakeVllmServer()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", server.chat)
    app.router.add_post("/v1/completions", server.complete)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.base_url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    yield server
    await runner.cleanup()


@dataclass
class ResponseBuilder:
    """Builds the response to one request, whole or in chunks; each of the three words is a token."""

    seen: RecordedRequest
    words: Sequence[str]
    call: dict[str, Any] | None

    @property
    def _finish_reason(self) -> str:
        return "tool_calls" if self.call else "stop"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.seen.response_id, "object": kind, "created": 1, "model": self.seen.body["model"]}

    @property
    def _choices(self) -> range:
        return range(self.seen.body.get("n") or 1)

    def _tokens(self, choice: int, first: int, last: int) -> dict[str, Any]:
        """Requested fields of a choice for the tokens [first, last)."""
        fields: dict[str, Any] = {}
        if self.seen.body.get("logprobs"):
            pairs = zip(self.words[first:last], LOGPROBS[first:last], strict=True)
            fields["logprobs"] = {"content": [_logprob(*pair) for pair in pairs]}
        if self.seen.body.get("return_token_ids"):
            fields["token_ids"] = [10 * choice + token_id for token_id in TOKEN_IDS[first:last]]
        return fields

    def _prompt(self) -> dict[str, Any]:
        return {"prompt_token_ids": PROMPT_IDS} if self.seen.body.get("return_token_ids") else {}

    def whole(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": None if self.call else "".join(self.words)}
        if self.call:
            message["tool_calls"] = [self.call]
        answer = {"message": message, "finish_reason": self._finish_reason}
        choices = [{"index": index, **answer, **self._tokens(index, 0, 3)} for index in self._choices]
        return {**self._head("chat.completion"), "choices": choices, "usage": USAGE, **self._prompt()}

    def _delta(self, index: int, word: str) -> dict[str, Any]:
        if self.call is None:
            return {"content": word}
        return {"tool_calls": [{"index": 0, **self.call}]} if index == 0 else {"tool_calls": []}

    def chunks(self) -> list[dict[str, Any]]:
        """Chunks in vLLM's order: an empty one with the prompt ids, one per token, one with the usage.

        A token without text, such as half a character, has a chunk only if token ids were requested.
        """
        head = self._head("chat.completion.chunk")
        opening = {"delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        chunks = [{**head, "choices": [{"index": choice, **opening}], **self._prompt()} for choice in self._choices]
        for index, word in enumerate(self.words):
            reason = self._finish_reason if index == len(self.words) - 1 else None
            delta = {"delta": self._delta(index, word), "finish_reason": reason}
            for choice in self._choices if word or self.seen.body.get("return_token_ids") else ():
                tokens = self._tokens(choice, index, index + 1)
                chunks.append({**head, "choices": [{"index": choice, **delta, **tokens}]})
        if (self.seen.body.get("stream_options") or {}).get("include_usage"):
            chunks.append({**head, "choices": [], "usage": USAGE})
        return chunks


def _tool_call(body: dict[str, Any], arguments: str) -> dict[str, Any] | None:
    """A call of a hand-off tool if there is one, else of the first tool, once."""
    names = [tool["function"]["name"] for tool in body.get("tools") or []]
    handoffs = [name for name in names if name.startswith("transfer_to_")]
    used = any(message["role"] == "tool" for message in body["messages"])
    if not names or (used and not handoffs):
        return None
    function = {"name": (handoffs or names)[0], "arguments": "{}" if handoffs else arguments}
    return {"id": "call_1", "type": "function", "function": function}


def _logprob(word: str, value: float) -> dict[str, Any]:
    return {"token": word, "logprob": value, "bytes": list(word.encode()), "top_logprobs": []}


async def _stream(request: web.Request, chunks: Sequence[dict[str, Any]]) -> web.StreamResponse:
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    for chunk in chunks:
        await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        await asyncio.sleep(0.002)
    await response.write(b"data: [DONE]\n\n")
    return response
