"""A small server with Anthropic's Messages API over a real socket, which records its requests."""

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer

Json = dict[str, Any]

THOUGHT = {"type": "thinking", "thinking": "They ask for mugs.", "signature": "s"}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "stock", "input": {"item": "mug"}}
USAGE = {"input_tokens": 11, "output_tokens": 3}


@dataclass
class AnthropicServer:
    """A request with tools is answered with thinking and a call of `stock`, any other with `Seven mugs.`"""

    base_url: str = ""
    seen: list[Json] = field(default_factory=list)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.seen.append(body)
        if "FAIL" in json.dumps(body["messages"]):
            return web.json_response(
                {"type": "error", "error": {"type": "overloaded_error", "message": "full"}}, status=529
            )
        calls = body.get("tools") and "tool_result" not in json.dumps(body["messages"])
        blocks = [THOUGHT, CALL] if calls else [{"type": "text", "text": "Seven mugs."}]
        message = {
            "id": f"msg_{len(self.seen)}",
            "type": "message",
            "role": "assistant",
            "model": "claude-tiny-1",
            "content": blocks,
            "stop_reason": "tool_use" if calls else "end_turn",
            "stop_sequence": None,
            "usage": USAGE,
        }
        return await _stream(request, message) if body.get("stream") else web.json_response(message)


@asynccontextmanager
async def running_anthropic() -> AsyncIterator[AnthropicServer]:
    server, app = AnthropicServer(), web.Application()
    app.router.add_post("/v1/messages", server.answer)
    async with TestServer(app) as running:
        server.base_url = str(running.make_url("")).rstrip("/")
        yield server


async def _stream(request: web.Request, message: Json) -> web.StreamResponse:
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    for event in _events(message):
        await response.write(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode())
    return response


def _events(message: Json) -> Iterator[Json]:
    yield {"type": "message_start", "message": {**message, "content": [], "stop_reason": None}}
    for index, block in enumerate(message["content"]):
        start, delta = _pieces(block)
        yield {"type": "content_block_start", "index": index, "content_block": start}
        yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}
    yield {"type": "message_delta", "delta": {"stop_reason": message["stop_reason"]}, "usage": message["usage"]}
    yield {"type": "message_stop"}


def _pieces(block: Json) -> tuple[Json, Json]:
    """A content block at its start in a stream, and the deltas that follow."""
    if block["type"] == "tool_use":
        return {**block, "input": {}}, {"type": "input_json_delta", "partial_json": json.dumps(block["input"])}
    if block["type"] == "thinking":
        return {**block, "thinking": ""}, {"type": "thinking_delta", "thinking": block["thinking"]}
    return {**block, "text": ""}, {"type": "text_delta", "text": block["text"]}
