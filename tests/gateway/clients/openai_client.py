"""The `openai` package since 1.0."""

import asyncio

import openai
from situation import MANY, MODEL, SETTINGS, TOOL, run, user


def client(url):
    return openai.OpenAI(base_url=url, api_key="none")


def whole(url):
    return client(url).chat.completions.create(model=MODEL, messages=user("hi")).choices[0].message.content


def stream(url):
    chunks = client(url).chat.completions.create(model=MODEL, messages=user("hi"), stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def text(url):
    return client(url).completions.create(model=MODEL, prompt="hi").choices[0].text


def text_stream(url):
    chunks = client(url).completions.create(model=MODEL, prompt="hi", stream=True)
    return "".join(chunk.choices[0].text for chunk in chunks)


def tools(url):
    answer = client(url).chat.completions.create(model=MODEL, messages=user("TOOL"), tools=[TOOL])
    (call,) = answer.choices[0].message.tool_calls
    return [call.function.name, call.function.arguments]


def tools_stream(url):
    chunks = client(url).chat.completions.create(model=MODEL, messages=user("TOOL"), tools=[TOOL], stream=True)
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    return [calls[0].function.name, "".join(call.function.arguments for call in calls)]


def choices(url):
    answer = client(url).chat.completions.create(model=MODEL, messages=user("hi"), n=2)
    return [choice.message.content for choice in answer.choices]


def settings(url):
    answer = client(url).chat.completions.create(
        model=MODEL, messages=user("hi"), response_format={"type": "json_object"}, **SETTINGS
    )
    return answer.choices[0].message.content


def logprobs(url):
    answer = client(url).chat.completions.create(model=MODEL, messages=user("hi"), logprobs=True)
    return [token.logprob for token in answer.choices[0].logprobs.content]


def unasked(url):
    answer = client(url).chat.completions.create(model=MODEL, messages=user("hi")).model_dump()
    return [answer["choices"][0]["logprobs"], "token_ids" in str(answer)]


def cancelled(url):
    chunks = client(url).chat.completions.create(model=MODEL, messages=user("SLOW"), stream=True)
    for chunk in chunks:
        if chunk.choices[0].delta.content == " there":
            chunks.close()
            return "left"


async def many(url):
    async with openai.AsyncOpenAI(base_url=url, api_key="none") as several:

        async def call():
            chunks = await several.chat.completions.create(model=MODEL, messages=user("hi"), stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

        return sorted(set(await asyncio.gather(*(call() for _ in range(MANY)))))


run(whole, stream, text, text_stream, tools, tools_stream, choices, settings, logprobs, unasked, cancelled, many)
