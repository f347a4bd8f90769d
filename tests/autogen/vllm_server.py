"""A small OpenAI-compatible server in vLLM's shape, over a real socket, that remembers what it was asked."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from aiohttp import web

USAGE = {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14}
WORDS = ["Seven", " mugs", " TERMINATE"]
PROMPT_IDS = [1, 2, 70000]
TOKEN_IDS = [301, 302, 303]
LOGPROBS = [-0.5, -0.25, -0.125]


@dataclass
class Seen:
    """One request: lower-case headers, JSON body and the id it was answered with."""

    headers: dict[str, str]
    body: dict[str, Any]
    response_id: str


@dataclass
class VllmServer:
    """`base_url` to talk to; `seen` in order of arrival."""

    base_url: str = ""
    seen: list[Seen] = field(default_factory=list)
    _numbers: Any = field(default_factory=count)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        headers = {name.lower(): value for name, value in request.headers.items()}
        seen = Seen(headers, body, f"chatcmpl-{next(self._numbers)}")
        self.seen.append(seen)
        if "FAIL" in body["messages"][-1]["content"]:
            return web.json_response({"error": {"message": "boom", "code": 400}}, status=400)
        await asyncio.sleep(0.3 if "SLOW" in body["messages"][-1]["content"] else 0.001)  # requests interleave
        return await (_stream(request, seen) if body.get("stream") else _whole(seen))


@asynccontextmanager
async def running_server() -> AsyncIterator[VllmServer]:
    server = VllmServer()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", server.chat)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.base_url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    yield server
    await runner.cleanup()


def _tool_call(body: dict[str, Any]) -> dict[str, Any] | None:
    """A hand-off where one is offered; else the first tool, once."""
    names = [tool["function"]["name"] for tool in body.get("tools") or []]
    handoffs = [name for name in names if name.startswith("transfer_to_")]
    used = any(message["role"] == "tool" for message in body["messages"])
    if not names or (used and not handoffs):
        return None
    name = (handoffs or names)[0]
    arguments = "{}" if handoffs else '{"item": "mug"}'
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}


def _logprob(word: str, value: float) -> dict[str, Any]:
    return {"token": word, "logprob": value, "bytes": list(word.encode()), "top_logprobs": []}


async def _whole(seen: Seen) -> web.Response:
    body, call = seen.body, _tool_call(seen.body)
    message: dict[str, Any] = {"role": "assistant", "content": None if call else "".join(WORDS)}
    choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": "tool_calls" if call else "stop"}
    answer = {"id": seen.response_id, "object": "chat.completion", "created": 1, "model": body["model"]}
    answer |= {"choices": [choice], "usage": USAGE}
    if call:
        message["tool_calls"] = [call]
    if body.get("logprobs"):
        choice["logprobs"] = {"content": [_logprob(*pair) for pair in zip(WORDS, LOGPROBS, strict=True)]}
    if body.get("return_token_ids"):
        answer["prompt_token_ids"] = PROMPT_IDS
        choice["token_ids"] = TOKEN_IDS
    return web.json_response(answer)


async def _stream(request: web.Request, seen: Seen) -> web.StreamResponse:
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    for chunk in _chunks(seen):
        await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        await asyncio.sleep(0.002)
    await response.write(b"data: [DONE]\n\n")
    return response


def _chunks(seen: Seen) -> list[dict[str, Any]]:
    """vLLM's order: the prompt's ids with an empty first chunk, then token by token, then the usage."""
    body, call = seen.body, _tool_call(seen.body)
    head = {"id": seen.response_id, "object": "chat.completion.chunk", "created": 1, "model": body["model"]}
    with_ids = body.get("return_token_ids")
    first = {**head, "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
    chunks = [{**first, "prompt_token_ids": PROMPT_IDS} if with_ids else first]
    for index, word in enumerate(WORDS):
        delta = {"tool_calls": [{"index": 0, **call}] if index == 0 else []} if call else {"content": word}
        reason = ("tool_calls" if call else "stop") if index == len(WORDS) - 1 else None
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        if body.get("logprobs"):
            choice["logprobs"] = {"content": [_logprob(word, LOGPROBS[index])]}
        if with_ids:
            choice["token_ids"] = [TOKEN_IDS[index]]
        chunks.append({**head, "choices": [choice]})
    if (body.get("stream_options") or {}).get("include_usage"):
        chunks.append({**head, "choices": [], "usage": USAGE})
    return chunks
