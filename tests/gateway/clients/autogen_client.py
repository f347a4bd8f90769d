"""AutoGen's `OpenAIChatCompletionClient`."""

import asyncio
import json

from autogen_core import CancellationToken
from autogen_core.models import ModelFamily, ModelInfo, UserMessage
from autogen_core.tools import FunctionTool
from autogen_ext.models.openai import OpenAIChatCompletionClient
from situation import MANY, MODEL, SETTINGS, run

INFO = ModelInfo(
    vision=False, function_calling=True, json_output=True, structured_output=True, family=ModelFamily.UNKNOWN
)


def client(url, **more):
    return OpenAIChatCompletionClient(model=MODEL, base_url=url, api_key="none", model_info=INFO, **more)


def user(text):
    return [UserMessage(content=text, source="user")]


def search(x: int) -> str:
    """Finds things."""
    return str(x)


TOOLS = [FunctionTool(search, description="Finds things.")]


async def whole(url):
    return (await client(url).create(user("hi"))).content


async def stream(url):
    *pieces, last = [piece async for piece in client(url).create_stream(user("hi"))]
    assert last.content == "".join(pieces)
    return last.content


async def tools(url):
    (call,) = (await client(url).create(user("TOOL"), tools=TOOLS)).content
    return [call.name, json.loads(call.arguments)]


async def tools_stream(url):
    *_, last = [piece async for piece in client(url).create_stream(user("TOOL"), tools=TOOLS)]
    (call,) = last.content
    return [call.name, json.loads(call.arguments)]


async def settings(url):
    return (await client(url, response_format={"type": "json_object"}, **SETTINGS).create(user("hi"))).content


async def logprobs(url):
    answer = await client(url).create(user("hi"), extra_create_args={"logprobs": True})
    return [token.logprob for token in answer.logprobs]


async def unasked(url):
    answer = await client(url).create(user("hi"))
    return [answer.logprobs, "token_ids" in str(answer)]


async def cancelled(url):
    token = CancellationToken()
    try:
        async for piece in client(url).create_stream(user("SLOW"), cancellation_token=token):
            if piece == " there":
                token.cancel()
    except asyncio.CancelledError:
        return "left"


async def many(url):
    model = client(url)

    async def call():
        *_, last = [piece async for piece in model.create_stream(user("hi"))]
        return last.content

    return sorted(set(await asyncio.gather(*(call() for _ in range(MANY)))))


run(whole, stream, tools, tools_stream, settings, logprobs, unasked, cancelled, many)
