"""An engine with vLLM's API whose tokens are the bytes of a plain chat template.

The response depends on the request only, so two agents that send the same messages receive the same tokens. A request
without tools is answered with a plan. A request with tools is answered with a call of the first tool, and then with the
tool's result.
"""

import json
import secrets
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

Json = dict[str, Any]

_ROLES = {"developer": "system"}
_PLAN = "Count the mugs in stock."
_CALL = {"name": "count_stock", "arguments": '{"item": "mug"}'}


def app() -> Starlette:
    return Starlette(routes=[Route("/v1/chat/completions", _chat, methods=["POST"])])


async def _chat(request: Request) -> Response:
    body = await request.json()
    answer = _answer(body)
    if body.get("stream"):
        return StreamingResponse(_events(answer, body), media_type="text/event-stream")
    return JSONResponse(answer)


def _answer(body: Json) -> Json:
    message = _say(body["messages"], body.get("tools") or [])
    prompt = list((_render(body["messages"]) + "assistant: ").encode())
    tokens = list(_render_message(message).removeprefix("assistant: ").encode())
    choice = {
        "index": 0,
        "message": message,
        "finish_reason": "tool_calls" if message.get("tool_calls") else "stop",
        "logprobs": {"content": [_logprob(*pair) for pair in enumerate(tokens)]} if body.get("logprobs") else None,
    }
    answer = {
        "id": f"chatcmpl-{secrets.token_hex(8)}",
        "object": "chat.completion",
        "created": 1,
        "model": body["model"],
        "choices": [choice],
        "usage": {
            "prompt_tokens": len(prompt),
            "completion_tokens": len(tokens),
            "total_tokens": len(prompt) + len(tokens),
        },
    }
    if body.get("return_token_ids"):
        answer["prompt_token_ids"] = prompt
        choice["token_ids"] = tokens
    return answer


async def _events(answer: Json, body: Json) -> AsyncIterator[bytes]:
    """The prompt's ids with an empty first chunk, then the whole response, then the usage."""
    head = {name: answer[name] for name in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    whole = dict(answer["choices"][0])
    delta = whole.pop("message")
    for index, call in enumerate(delta.get("tool_calls") or ()):
        call["index"] = index
    opening = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
    chunks: list[Json] = [head | {"choices": [opening]}, head | {"choices": [whole | {"delta": delta}]}]
    if "prompt_token_ids" in answer:
        chunks[0]["prompt_token_ids"] = answer["prompt_token_ids"]
    if (body.get("stream_options") or {}).get("include_usage"):
        chunks.append(head | {"choices": [], "usage": answer["usage"]})
    for chunk in chunks:
        yield b"data: " + json.dumps(chunk).encode() + b"\n\n"
    yield b"data: [DONE]\n\n"


def _say(messages: list[Json], tools: list[Json]) -> Json:
    if messages[-1]["role"] == "tool":
        return {"role": "assistant", "content": f"There are {_text(messages[-1]['content'])} mugs."}
    if not tools:
        return {"role": "assistant", "content": _PLAN}
    call = {"id": f"call_{secrets.token_hex(4)}", "type": "function", "function": _CALL}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def _render(messages: list[Json]) -> str:
    return "".join(map(_render_message, messages))


def _render_message(message: Json) -> str:
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    # clients may serialize the arguments of a call differently
    calls = [f"{function['name']}({json.dumps(json.loads(function['arguments']))})" for function in functions]
    role = _ROLES.get(message["role"], message["role"])
    return f"{role}: {_text(message.get('content'))}{''.join(calls)}\n"


def _text(content: Any) -> str:
    """The text of a message, whose content may be a string, a list of parts, or absent."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""


def _logprob(position: int, token: int) -> Json:
    """A value that differs by position and token and is exact in float32."""
    logprob = -(position % 64 + token / 256 + 1) / 64
    return {"token": chr(token), "logprob": logprob, "bytes": [token], "top_logprobs": []}
