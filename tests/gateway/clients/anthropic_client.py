"""Anthropic's own client, at the base URL without `/v1`."""

import asyncio

import anthropic
from situation import MANY, MODEL, TOOL, run, user

TOOLS = [{"name": "search", "description": "Finds things.", "input_schema": TOOL["function"]["parameters"]}]


def client(url):
    return anthropic.Anthropic(base_url=url.removesuffix("/v1"), api_key="none")


def asked(text="hi", **more):
    return {"model": MODEL, "max_tokens": 99, "messages": user(text), **more}


def whole(url):
    return client(url).messages.create(**asked()).content[0].text


def stream(url):
    with client(url).messages.stream(**asked()) as events:
        text = "".join(events.text_stream)
        assert events.get_final_message().content[0].text == text
        return text


def tools(url):
    (block,) = client(url).messages.create(**asked("TOOL", tools=TOOLS)).content
    return [block.name, block.input]


def tools_stream(url):
    with client(url).messages.stream(**asked("TOOL", tools=TOOLS)) as events:
        (block,) = events.get_final_message().content
        return [block.name, block.input]


def cancelled(url):
    with client(url).messages.stream(**asked("SLOW")) as events:
        for text in events.text_stream:
            if text == " there":
                return "left"


async def many(url):
    async with anthropic.AsyncAnthropic(base_url=url.removesuffix("/v1"), api_key="none") as several:

        async def call():
            async with several.messages.stream(**asked()) as events:
                return "".join([text async for text in events.text_stream])

        return sorted(set(await asyncio.gather(*(call() for _ in range(MANY)))))


run(whole, stream, tools, tools_stream, cancelled, many)
