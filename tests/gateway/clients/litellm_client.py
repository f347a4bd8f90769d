"""LiteLLM as a library."""

import asyncio

import litellm
from situation import MANY, MODEL, SETTINGS, TOOL, run, user

NAME = f"openai/{MODEL}"


def chat(url, text="hi", **more):
    return litellm.completion(model=NAME, api_base=url, api_key="none", messages=user(text), **more)


def whole(url):
    return chat(url).choices[0].message.content


def stream(url):
    return "".join(chunk.choices[0].delta.content or "" for chunk in chat(url, stream=True))


def text(url):
    name = f"text-completion-openai/{MODEL}"
    return litellm.text_completion(model=name, api_base=url, api_key="none", prompt="hi").choices[0].text


def tools(url):
    (call,) = chat(url, "TOOL", tools=[TOOL]).choices[0].message.tool_calls
    return [call.function.name, call.function.arguments]


def choices(url):
    return [choice.message.content for choice in chat(url, n=2).choices]


def settings(url):
    return chat(url, response_format={"type": "json_object"}, **SETTINGS).choices[0].message.content


def logprobs(url):
    return [token.logprob for token in chat(url, logprobs=True).choices[0].logprobs.content]


async def cancelled(url):
    chunks = await litellm.acompletion(model=NAME, api_base=url, api_key="none", messages=user("SLOW"), stream=True)
    async for chunk in chunks:
        if chunk.choices[0].delta.content == " there":
            break
    await chunks.completion_stream.close()
    return "left"


async def many(url):
    async def call():
        chunks = await litellm.acompletion(model=NAME, api_base=url, api_key="none", messages=user("hi"), stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    return sorted(set(await asyncio.gather(*(call() for _ in range(MANY)))))


run(whole, stream, text, tools, choices, settings, logprobs, cancelled, many)
