"""LangChain's `ChatOpenAI` and `OpenAI`."""

import asyncio

from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI, OpenAI
from situation import MANY, MODEL, SETTINGS, TOOL, run


def chat(url, **more):
    return ChatOpenAI(base_url=url, api_key="none", model=MODEL, **more)


def whole(url):
    return chat(url).invoke("hi").content


def stream(url):
    return "".join(chunk.content for chunk in chat(url).stream("hi"))


def text(url):
    return OpenAI(base_url=url, api_key="none", model=MODEL).invoke("hi")


def text_stream(url):
    return "".join(OpenAI(base_url=url, api_key="none", model=MODEL).stream("hi"))


def tools(url):
    (call,) = chat(url).bind_tools([TOOL]).invoke("TOOL").tool_calls
    return [call["name"], call["args"]]


def tools_stream(url):
    chunks = list(chat(url).bind_tools([TOOL]).stream("TOOL"))
    (call,) = sum(chunks[1:], chunks[0]).tool_calls
    return [call["name"], call["args"]]


def choices(url):
    (generations,) = chat(url, n=2).generate([[HumanMessage("hi")]]).generations
    return [generation.text for generation in generations]


def settings(url):
    return chat(url, **SETTINGS).bind(response_format={"type": "json_object"}).invoke("hi").content


def logprobs(url):
    answer = chat(url, logprobs=True).invoke("hi")
    return [token["logprob"] for token in answer.response_metadata["logprobs"]["content"]]


def unasked(url):
    answer = chat(url).invoke("hi")
    return [answer.response_metadata["logprobs"], "token_ids" in answer.model_dump_json()]


def responses(url):
    return chat(url, use_responses_api=True).invoke("hi").text


async def cancelled(url):
    async for chunk in chat(url).astream("SLOW"):
        if chunk.content == " there":
            break
    return "left"


async def many(url):
    model = chat(url)

    async def call():
        return "".join([chunk.content async for chunk in model.astream("hi")])

    return sorted(set(await asyncio.gather(*(call() for _ in range(MANY)))))


run(
    whole,
    stream,
    text,
    text_stream,
    tools,
    tools_stream,
    choices,
    settings,
    logprobs,
    unasked,
    responses,
    cancelled,
    many,
)
