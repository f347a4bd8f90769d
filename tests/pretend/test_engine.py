"""The in-process engine on an accelerator answers as on the CPU."""

import asyncio
from collections.abc import Iterator

import httpx
import pytest

from agl_trainer.engine.copied import CopiedEngine
from agl_trainer.engine.http.api import engine_app
from agl_trainer.engine.local.scheduler import Scheduler
from agl_trainer.engine.protocol import SampledToken, SamplingParams
from agl_trainer.model.policy import Policy
from tests.pretend.accelerator import DEVICE
from tests.trainer.engine.test_scheduler import MODELS, PROMPTS, collect, engine
from tests.trainer.scripted_sampler import events, serving
from tests.trainer.small_model import small_model, small_policy

PARAMS = [
    SamplingParams(9, temperature=0.0, top_logprobs=3),
    SamplingParams(7, temperature=1.0, seed=1),
    SamplingParams(8, temperature=0.7, top_p=0.8, top_k=20, min_p=0.01, seed=2, top_logprobs=1),
]


@pytest.fixture
def policy() -> Policy:
    return small_policy(small_model().to(DEVICE))


async def answers(policy: Policy) -> list[list[SampledToken]]:
    """Of mixed adapters, shared prefixes and different parameters, in batches."""
    async with engine(policy, max_batch=8) as scheduler:
        asked = [(prompt, name, PARAMS[number % 3]) for name in MODELS for number, prompt in enumerate(PROMPTS)]
        return await asyncio.gather(*(collect(scheduler.submit(*one)) for one in asked))


async def test_sampled_tokens_and_logprobs(policy: Policy) -> None:
    found, expected = await answers(policy), await answers(small_policy())
    for one, other in zip(found, expected, strict=True):
        assert [token.token_id for token in one] == [token.token_id for token in other]
        assert [token.logprob for token in one] == pytest.approx([token.logprob for token in other], abs=1e-4)
        for left, right in zip(one, other, strict=True):
            assert [token for token, _ in left.top] == [token for token, _ in right.top]


@pytest.fixture
def urls(policy: Policy) -> Iterator[list[str]]:
    """The API of an engine on the accelerator, and of one on the CPU."""
    with (
        Scheduler(policy, max_batch=4, max_model_len=96) as one,
        Scheduler(small_policy(), max_batch=4, max_model_len=96) as other,
    ):
        apps = [
            engine_app(scheduler, policy.tokenizer, served_name="small", max_model_len=96, default_max_tokens=24)
            for scheduler in (one, other)
        ]
        with serving(apps[0]) as first, serving(apps[1]) as second:
            yield [first, second]


def test_streaming_and_stop_strings(urls: list[str]) -> None:
    body = {"model": "writer", "messages": [{"role": "user", "content": "hello there"}], "seed": 4, "logprobs": True}
    whole = [httpx.post(f"{url}/v1/chat/completions", json=body).json()["choices"][0] for url in urls]
    text = whole[0]["message"]["content"]
    assert len(text) > 4 and text == whole[1]["message"]["content"]
    for url in urls:
        stopped = httpx.post(f"{url}/v1/chat/completions", json=body | {"stop": [text[3]]}).json()["choices"][0]
        assert stopped["message"]["content"] == text[: text.index(text[3])] and stopped["finish_reason"] == "stop"
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body | {"stream": True}) as response:
            chunks = events(response.iter_lines())
        pieces = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"]]
        assert "".join(pieces) == text


async def test_a_copied_engine_takes_the_new_adapters(policy: Policy) -> None:
    trained = small_policy(small_model().to(DEVICE))
    for parameter in trained.parameters("writer"):
        parameter.data.mul_(-1)
    trained.versions["writer"] += 1
    async with engine(policy) as scheduler:
        CopiedEngine(trained, policy, scheduler).make_live()
        tokens = await collect(scheduler.submit(PROMPTS[0], "writer@1", PARAMS[0]))
    async with engine(trained) as scheduler:
        assert tokens == await collect(scheduler.submit(PROMPTS[0], "writer@1", PARAMS[0]))
