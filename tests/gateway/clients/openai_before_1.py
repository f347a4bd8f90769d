"""The `openai` package before 1.0: module-level functions, answers that are dictionaries."""

import asyncio

import aiohttp
import openai
from situation import MANY, MODEL, SETTINGS, TOOL, run, user

openai.api_key = "none"


def chat(url, text="hi", **more):
    return openai.ChatCompletion.create(api_base=url, model=MODEL, messages=user(text), **more)


def whole(url):
    return chat(url)["choices"][0]["message"]["content"]


def stream(url):
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chat(url, stream=True))


def text(url):
    return openai.Completion.create(api_base=url, model=MODEL, prompt="hi")["choices"][0]["text"]


def text_stream(url):
    chunks = openai.Completion.create(api_base=url, model=MODEL, prompt="hi", stream=True)
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


def tools(url):
    (call,) = chat(url, "TOOL", tools=[TOOL])["choices"][0]["message"]["tool_calls"]
    return [call["function"]["name"], call["function"]["arguments"]]


def choices(url):
    return [choice["message"]["content"] for choice in chat(url, n=2)["choices"]]


def settings(url):
    return chat(url, response_format={"type": "json_object"}, **SETTINGS)["choices"][0]["message"]["content"]


def logprobs(url):
    return [token["logprob"] for token in chat(url, logprobs=True)["choices"][0]["logprobs"]["content"]]


def unasked(url):
    answer = chat(url)
    return [answer["choices"][0]["logprobs"], "token_ids" in str(answer)]


async def cancelled(url):
    async with aiohttp.ClientSession() as session:
        openai.aiosession.set(session)
        chunks = await openai.ChatCompletion.acreate(api_base=url, model=MODEL, messages=user("SLOW"), stream=True)
        async for chunk in chunks:
            if chunk["choices"][0]["delta"].get("content") == " there":
                break
    return "left"


async def many(url):
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        openai.aiosession.set(session)

        async def call():
            chunks = await openai.ChatCompletion.acreate(api_base=url, model=MODEL, messages=user("hi"), stream=True)
            return "".join([chunk["choices"][0]["delta"].get("content") or "" async for chunk in chunks])

        return sorted(set(await asyncio.gather(*(call() for _ in range(MANY)))))


run(whole, stream, text, text_stream, tools, choices, settings, logprobs, unasked, cancelled, many)
