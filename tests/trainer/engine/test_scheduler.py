"""The scheduler on a small model: it samples the tokens of PEFT and transformers, whatever else is in the batch."""

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch

from agl_trainer.compute.logprobs import row_logprobs
from agl_trainer.data.rows import TrainingRow
from agl_trainer.data.truncation import Truncation
from agl_trainer.engine.local import scheduler as scheduler_module
from agl_trainer.engine.local import sequence as sequence_module
from agl_trainer.engine.local.scheduler import Scheduler
from agl_trainer.engine.protocol import (
    ContextLengthError,
    EngineError,
    EngineStoppedError,
    Generation,
    PromptError,
    SampledToken,
    SamplingParams,
    UnknownModelError,
)
from agl_trainer.model.lora import BASE
from agl_trainer.model.policy import Policy
from tests.trainer.small_model import VOCABULARY, plain_logits, plain_model, small_model, small_policy

MODELS = {"writer": "writer", "fixer": "fixer", "small": BASE}
"""Model names of requests, and the adapter of each."""
LONG = random.Random(0).choices(range(400), k=48)
PROMPTS = [LONG, [*LONG, 1, 2], [*LONG, 3], [*LONG[:40], 4, 5], [*LONG[:12], 6], LONG[:12], [7], [7, 8], LONG]
"""Prefixes longer and shorter than MIN_SHARED_TOKENS, a prompt that is a prefix of another, and equal prompts."""


def greedy(max_tokens: int, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens, temperature=0.0, **options)


@asynccontextmanager
async def engine(policy: Policy, *, max_batch: int = 64, max_model_len: int = 256) -> AsyncIterator[Scheduler]:
    with Scheduler(policy, max_batch=max_batch, max_model_len=max_model_len) as scheduler:
        yield scheduler


async def collect(generation: Generation) -> list[SampledToken]:
    return [token async for token in generation]


async def answer(generation: Generation) -> list[int]:
    return [token.token_id for token in await collect(generation)]


async def first_tokens(generation: Generation, count: int) -> AsyncIterator[SampledToken]:
    """Iterator over `generation` after its first `count` tokens, so that it runs."""
    tokens = generation.__aiter__()
    for _ in range(count):
        await anext(tokens)
    return tokens


@torch.no_grad()
def plain_answer(policy: Policy, adapter: str, prompt: Sequence[int], max_tokens: int) -> list[int]:
    """Greedy answer without cache, batch or packing."""
    model, row = plain_model(policy, adapter, small_model()), list(prompt)
    for _ in range(max_tokens):
        row.append(int(plain_logits(model, row)[-1].argmax()))
    return row[len(prompt) :]


@pytest.fixture
def policy() -> Policy:
    return small_policy()


# --- what is sampled ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_batch", [1, 4, 64])
async def test_greedy_answers_equal_the_plain_models_in_any_batch(policy: Policy, max_batch: int) -> None:
    """Mixed adapters, shared prefixes, answers of different lengths, and more requests than fit the batch."""
    asked = [(name, prompt, 1 + (3 * i + len(name)) % 8) for name in MODELS for i, prompt in enumerate(PROMPTS)]
    random.Random(5).shuffle(asked)
    async with engine(policy, max_batch=max_batch) as scheduler:
        await collect(scheduler.submit(LONG[:30], "small", greedy(2)))
        submitted = [scheduler.submit(prompt, name, greedy(length)) for name, prompt, length in asked]
        answers = await asyncio.gather(*map(answer, submitted))
    assert scheduler.tokens_sampled == 2 + sum(map(len, answers))
    for (name, prompt, length), found in zip(asked, answers, strict=True):
        assert found == plain_answer(policy, MODELS[name], prompt, length)
    assert len({tuple(found[:1]) for found in answers}) > 10  # the adapters and prompts do matter


async def test_a_running_sequence_keeps_its_prefix_when_others_split_it(policy: Policy) -> None:
    async with engine(policy) as scheduler:
        running = scheduler.submit(LONG, "writer", greedy(20))
        rest = await first_tokens(running, 3)
        others = [scheduler.submit(prompt, "writer", greedy(4)) for prompt in PROMPTS]
        answers = await asyncio.gather(*map(answer, others))
        tail = [token.token_id async for token in rest]
    assert tail == plain_answer(policy, "writer", LONG, 20)[3:]
    assert answers == [plain_answer(policy, "writer", prompt, 4) for prompt in PROMPTS]


async def test_an_earlier_request_shares_its_prefix_with_later_ones(policy: Policy) -> None:
    async with engine(policy) as scheduler:
        first = scheduler.submit([*LONG, 9], "writer", greedy(40))
        rest = await first_tokens(first, 2)
        assert first.slot_length > len(LONG)
        others = [scheduler.submit([*LONG, token], "writer", greedy(4)) for token in range(4)]
        answers = await asyncio.gather(*map(answer, others))
        tail = [token.token_id async for token in rest]
    assert first.slot_length < len(LONG)
    assert tail == plain_answer(policy, "writer", [*LONG, 9], 40)[2:]
    assert answers == [plain_answer(policy, "writer", [*LONG, token], 4) for token in range(4)]


async def test_only_prompts_in_use_survive_in_a_full_cache(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "PREFIX_TOKENS", 16)
    async with engine(policy, max_batch=3) as scheduler:
        for _ in range(2):
            submitted = [
                scheduler.submit(prompt, name, greedy(5)) for prompt in PROMPTS for name in ("writer", "fixer")
            ]
            answers = await asyncio.gather(*map(answer, submitted))
        await collect(scheduler.submit(LONG, "small", greedy(1)))
        assert [tree.size for tree in scheduler._trees.values()] == [0, 0, len(LONG) - 1]
    expected = [plain_answer(policy, name, prompt, 5) for prompt in PROMPTS for name in ("writer", "fixer")]
    assert answers == expected


async def test_a_cached_prompt_is_not_computed_again(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    through = policy.sampled_states

    def counted(tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
        computed.append(len(tokens))
        return through(tokens, *rest)

    monkeypatch.setattr(policy, "sampled_states", counted)
    async with engine(policy) as scheduler:
        for prompt in (LONG, LONG, [*LONG[:40], 4, 5]):
            await collect(scheduler.submit(prompt, "writer", greedy(2)))
        await collect(scheduler.submit(LONG, "fixer", greedy(2)))
    # The last token of a prompt is fed with the decoding: 47, nothing, the one after the 40 shared ones; 47 again.
    assert computed == [47, 1, 1, 1, 1, 1, 1, 1, 47, 1, 1]
    assert scheduler.prompt_tokens_computed == 47 + 1 + 1 + (1 + 1) + 47 + 1


@pytest.mark.parametrize("truncation", [Truncation(), Truncation(top_p=0.9), Truncation(top_k=5, min_p=0.1)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
async def test_sampled_logprobs_are_those_that_the_trainer_computes(
    policy: Policy, truncation: Truncation, temperature: float
) -> None:
    asked = [(name, prompt) for name in ("writer", "fixer") for prompt in PROMPTS]
    async with engine(policy) as scheduler:
        options: dict[str, Any] = truncation._asdict() | {"temperature": temperature}
        params = [SamplingParams(12, seed=seed, **options) for seed in range(len(asked))]
        submitted = [scheduler.submit(prompt, name, p) for (name, prompt), p in zip(asked, params, strict=True)]
        sampled = await asyncio.gather(*map(collect, submitted))
    for role in ("writer", "fixer"):
        own = [(prompt, tokens) for (name, prompt), tokens in zip(asked, sampled, strict=True) if name == role]
        rows = [
            TrainingRow(
                prompt + [token.token_id for token in tokens],
                [0] * len(prompt) + [1] * len(tokens),
                1.0,
                temperatures=[temperature] * (len(prompt) + len(tokens)),
                truncation=truncation,
            )
            for prompt, tokens in own
        ]
        found = torch.tensor([[token.logprob for token in tokens] for _, tokens in own])
        assert (row_logprobs(policy, role, rows).logprobs - found).abs().max() < 1e-4
        assert len({tuple(row.token_ids[-12:]) for row in rows}) == len(rows)


async def test_one_at_a_time_a_seed_gives_the_same_tokens(policy: Policy) -> None:
    async with engine(policy, max_batch=1) as scheduler:
        seeded = [scheduler.submit(LONG, "writer", SamplingParams(20, seed=seed)) for seed in (1, 2, 1)]
        first, second, again = await asyncio.gather(*map(answer, seeded))
        fresh = [scheduler.submit(LONG, "writer", SamplingParams(20)) for _ in range(2)]
        one, other = await asyncio.gather(*map(answer, fresh))
    assert first == again != second
    assert one != other


async def test_an_answer_ends_with_its_stop_token_or_at_its_length(policy: Policy) -> None:
    expected = plain_answer(policy, "writer", LONG, 8)
    stop = next(token for place, token in enumerate(expected) if place >= 2 and token not in expected[:place])
    async with engine(policy) as scheduler:
        stopped = scheduler.submit(LONG, "writer", greedy(8, stop_token_ids=frozenset({stop})))
        whole = scheduler.submit(LONG, "writer", greedy(8))
        assert await answer(stopped) == expected[: expected.index(stop) + 1]
        assert await answer(whole) == expected
    assert (stopped.finish_reason, whole.finish_reason) == ("stop", "length")


# --- cancelling -----------------------------------------------------------------------------------------------------


async def test_a_cancelled_sequence_ends_and_makes_room(policy: Policy) -> None:
    async with engine(policy, max_batch=1) as scheduler:
        running = scheduler.submit(LONG, "writer", greedy(200))
        unwanted, wanted = (scheduler.submit(LONG, "writer", greedy(4)) for _ in range(2))
        rest = await first_tokens(running, 2)
        unwanted.cancel()
        running.cancel()
        running.cancel()
        assert len([token async for token in rest]) < 198
        assert await answer(unwanted) == []
        assert await answer(wanted) == plain_answer(policy, "writer", LONG, 4)
        assert (running.finish_reason, unwanted.finish_reason) == (None, None)
        wanted.cancel()
        assert wanted.finish_reason == "length"


async def test_cancelled_sequences_leave_the_others_their_slots(policy: Policy) -> None:
    async with engine(policy) as scheduler:
        submitted = [scheduler.submit(prompt, "writer", greedy(12)) for prompt in PROMPTS]
        rests = [await first_tokens(generation, 1) for generation in submitted]
        for generation in submitted[::2]:
            generation.cancel()
        tails = [[token.token_id async for token in rest] for rest in rests]
    for prompt, tail in list(zip(PROMPTS, tails, strict=True))[1::2]:
        assert tail == plain_answer(policy, "writer", prompt, 12)[1:]


async def test_a_caller_with_a_closed_loop_does_not_block_the_engine(policy: Policy) -> None:
    async with engine(policy, max_batch=1) as scheduler:

        async def leave() -> Generation:
            return scheduler.submit(LONG, "writer", greedy(200))

        await asyncio.to_thread(asyncio.run, leave())
        assert len(await answer(scheduler.submit(LONG, "writer", greedy(3)))) == 3
        assert scheduler.tokens_sampled < 100


# --- what is refused ------------------------------------------------------------------------------------------------


async def test_models_that_are_not_served_are_rejected(policy: Policy) -> None:
    policy.versions["writer"] = 3
    async with engine(policy) as scheduler:
        assert scheduler.models() == ["small", "writer", "fixer", "writer@3", "fixer@0"]
        for name in ("editor", "writer@2", "small@1", BASE):
            with pytest.raises(UnknownModelError, match=f"model '{name}' is not served here; known are small, writer"):
                scheduler.submit([1], name, greedy(1))
        served = [scheduler.submit([1], name, greedy(1)) for name in (*scheduler.models(), "small@0")]
        await asyncio.gather(*map(collect, served))
    versions = ["small@0", "writer@3", "fixer@0", "writer@3", "fixer@0", "small@0"]
    assert [generation.version for generation in served] == versions


async def test_invalid_prompts_are_rejected(policy: Policy) -> None:
    async with engine(policy, max_model_len=20) as scheduler:
        with pytest.raises(ContextLengthError, match=r"15 prompt tokens and max_tokens 6 exceed .* max_model_len 20"):
            scheduler.submit([1] * 15, "writer", greedy(6))
        with pytest.raises(PromptError, match="the prompt has no tokens"):
            scheduler.submit([], "writer", greedy(6))
        running = scheduler.submit([1] * 15, "writer", greedy(5))
        for token in (VOCABULARY, -1):
            with pytest.raises(
                PromptError, match=f"the prompt has token {token}, .* of the tokens 0 to {VOCABULARY - 1};"
            ):
                scheduler.submit([1, token, 2], "writer", greedy(6))
        assert len(await answer(running)) == 5


# --- pausing to update weights --------------------------------------------------------------------------------------


class Pause:
    """A pause of `scheduler` in another thread, until `release` is set."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.entered, self.release = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        with self._scheduler.paused():
            self.entered.set()
            self.release.wait(10)


async def test_a_pause_waits_for_running_sequences_and_holds_new_ones(policy: Policy) -> None:
    async with engine(policy) as scheduler:
        running = scheduler.submit(LONG, "writer", greedy(150))
        rest = await first_tokens(running, 1)
        pause = Pause(scheduler)
        await asyncio.to_thread(pause.entered.wait, 10)
        assert running.finish_reason == "length"
        assert len([token async for token in rest]) == 149
        held = asyncio.ensure_future(collect(scheduler.submit(LONG, "writer", greedy(2))))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(held), 0.1)
        pause.release.set()
        assert len(await held) == 2


async def test_a_second_pause_waits_for_sequences_that_the_first_held(policy: Policy) -> None:
    async with engine(policy) as scheduler:
        with scheduler.paused():
            held = scheduler.submit(LONG, "writer", greedy(150))
            await asyncio.sleep(0.05)  # the engine sees that it may not start
        await first_tokens(held, 1)
        with scheduler.paused():
            assert held.finish_reason == "length"


async def test_pauses_nest(policy: Policy) -> None:
    async with engine(policy) as scheduler:
        with scheduler.paused():
            with scheduler.paused():
                held = asyncio.ensure_future(collect(scheduler.submit(LONG, "writer", greedy(2))))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(held), 0.1)
        assert len(await held) == 2


async def test_after_an_update_the_new_weights_answer(policy: Policy) -> None:
    """The prompt was cached before the pause; the keys and values of the old weights must not be used."""
    other = small_policy(adapter_std=0.3)
    async with engine(policy) as scheduler:
        before = await answer(scheduler.submit(LONG, "writer", greedy(6)))
        with scheduler.paused():
            asked = scheduler.submit(LONG, "writer", greedy(6))
            pinned = scheduler.submit(LONG, "writer@0", greedy(6))
            policy.load_adapter("writer", other.adapter("writer"), 1)
        with pytest.raises(UnknownModelError, match="writer@0 was replaced by writer@1"):
            await collect(pinned)
        after = await answer(asked)
    assert asked.version == "writer@1"
    assert after == plain_answer(other, "writer", LONG, 6) != before


async def test_the_version_is_set_on_admission(policy: Policy) -> None:
    async with engine(policy, max_batch=1) as scheduler:
        early = scheduler.submit(LONG, "writer", greedy(40))
        late = scheduler.submit(LONG, "writer", greedy(1))
        await first_tokens(early, 1)
        policy.versions["writer"] = 1
        await collect(late)
    assert (early.version, late.version) == ("writer@0", "writer@1")


# --- failing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("deliver_at_end", "wakes"), [(False, [1, 1, 1, 1]), (True, [4])])
async def test_delivery_at_the_end_wakes_the_caller_once(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, deliver_at_end: bool, wakes: list[int]
) -> None:
    arrived: list[int] = []
    through = sequence_module._put_all

    def count(batch: Any) -> None:
        arrived.extend(len(item) for _, item in batch if item)
        through(batch)

    monkeypatch.setattr(sequence_module, "_put_all", count)
    async with engine(policy) as scheduler:
        found = await answer(scheduler.submit([7, 8], "writer", greedy(4, deliver_at_end=deliver_at_end)))
    assert found == plain_answer(policy, "writer", [7, 8], 4)
    assert arrived == wakes


async def test_an_error_reaches_every_caller_and_the_engine_goes_on(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with engine(policy, max_batch=1) as scheduler:
        running = scheduler.submit(LONG, "writer", greedy(200))
        waiting = scheduler.submit(LONG, "writer", greedy(2))
        await first_tokens(running, 1)
        with monkeypatch.context() as broken:
            broken.setattr(policy, "sampled_states", lambda *_: 1 / 0)
            for generation, role in ((running, "writer@0"), (waiting, "writer")):
                with pytest.raises(EngineError, match="sampling failed: ZeroDivisionError: division by zero") as failed:
                    await collect(generation)
                assert f"in the batch: 1; this one: {role}, prompt tokens {len(LONG)}, sampled " in str(failed.value)
        assert await answer(scheduler.submit(LONG, "writer", greedy(4))) == plain_answer(policy, "writer", LONG, 4)
        with scheduler.paused():
            pass


async def test_a_stopping_engine_raises_in_its_callers(policy: Policy) -> None:
    async with engine(policy, max_batch=1) as scheduler:
        running, waiting = (scheduler.submit(LONG, "writer", greedy(200)) for _ in range(2))
        await first_tokens(running, 1)
        pause = Pause(scheduler)
    for generation in (running, waiting):
        with pytest.raises(EngineStoppedError, match="the engine has stopped"):
            await collect(generation)
    with pytest.raises(EngineStoppedError, match="the engine has stopped"):
        scheduler.submit(LONG, "writer", greedy(1))
    assert pause.entered.wait(5)
    pause.release.set()
    pause.thread.join(5)
