"""No client at all: `requests`, `httpx` and `curl`."""

import asyncio
import json
import subprocess

import httpx
import requests
from situation import MANY, MODEL, SETTINGS, TOOL, run, user


def body(text="hi", **more):
    return {"model": MODEL, "messages": user(text), **more}


def spoken(lines):
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return "".join(json.loads(one)["choices"][0]["delta"].get("content") or "" for one in data[:-1])


def curl(url, sent):
    command = ["curl", "--silent", "--no-buffer", "--fail", f"{url}/chat/completions", "--json", json.dumps(sent)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def whole(url):
    return requests.post(f"{url}/chat/completions", json=body()).json()["choices"][0]["message"]["content"]


def stream(url):
    with requests.post(f"{url}/chat/completions", json=body(stream=True), stream=True) as answer:
        return spoken(answer.iter_lines(decode_unicode=True))


def curl_whole(url):
    return json.loads(curl(url, body()))["choices"][0]["message"]["content"]


def curl_stream(url):
    return spoken(curl(url, body(stream=True)).splitlines())


def tools(url):
    answer = httpx.post(f"{url}/chat/completions", json=body("TOOL", tools=[TOOL])).json()
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    return [call["function"]["name"], call["function"]["arguments"]]


def choices(url):
    answer = httpx.post(f"{url}/chat/completions", json=body(n=2)).json()
    return [choice["message"]["content"] for choice in answer["choices"]]


def settings(url):
    sent = body(response_format={"type": "json_object"}, **SETTINGS)
    return httpx.post(f"{url}/chat/completions", json=sent).json()["choices"][0]["message"]["content"]


def cancelled(url):
    with httpx.stream("POST", f"{url}/chat/completions", json=body("SLOW", stream=True)) as answer:
        for line in answer.iter_lines():
            if " there" in line:
                return "left"


async def many(url):
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=MANY), timeout=60) as client:

        async def call():
            async with client.stream("POST", f"{url}/chat/completions", json=body(stream=True)) as answer:
                return spoken([line async for line in answer.aiter_lines()])

        return sorted(set(await asyncio.gather(*(call() for _ in range(MANY)))))


run(whole, stream, curl_whole, curl_stream, tools, choices, settings, cancelled, many)
