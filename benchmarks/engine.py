"""Tokens per second of the in-process engine, vLLM on the CPU and transformers' `generate`. Prints Markdown.

    .venv/bin/python -m benchmarks.engine

Each engine answers one warm-up request. Each round then sends every engine in turn 8 requests at once, and 32 at once,
and samples 48 tokens for each at temperature 1 from the full distribution. The prompts of a round share their first 300
tokens and have 12 tokens of their own. They are random and new in every round, so that no engine can reuse the cache of
an earlier round. All engines compute in float32 unless the table says otherwise. Ours and vLLM answer over HTTP
(`/v1/completions`); `generate` gets the whole batch in one call, in the process of the client. In the rows `two
adapters`, requests alternate between two LoRA adapters of rank 16.

Rates count the tokens actually sampled, since an answer may end early. Our engine also reports how many prompt tokens
it computed, and its logprobs are compared with those of the trainer's forward pass for the same tokens.
"""

import agl_trainer  # noqa: F401  # before torch, which reads how long an idle thread spins

# isort: split
import argparse
import asyncio
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import torch
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from agl.config import RoleConfig
from agl.server.app_thread import AppThread
from agl_trainer.compute.logprobs import row_logprobs
from agl_trainer.data.rows import TrainingRow
from agl_trainer.engine.http.api import engine_app
from agl_trainer.engine.local.scheduler import Scheduler
from agl_trainer.model.base_model import load_model, use_bfloat16_products
from agl_trainer.model.lora import BASE
from agl_trainer.model.model_folder import model_folder
from agl_trainer.model.policy import Policy
from tests.vllm.environment import TORCH, VLLM
from tests.vllm.serving import serve_vllm

MODEL = "smollm2"
CONCURRENT = (8, 32)
SHARED, OWN, NEW = 300, 12, 48
MAX_MODEL_LEN = 1024
TARGET = 1.3
Prompts = Sequence[list[int]]


@dataclass(frozen=True)
class Answer:
    """Sampled token ids of one sequence, and their logprobs; empty if the engine reports none."""

    tokens: list[int]
    logprobs: list[float]


@dataclass
class Contestant:
    """An engine and its rates in tokens per second, one per round, by the number of simultaneous requests."""

    name: str
    sample: Callable[[Prompts], list[Answer]]
    rates: dict[int, list[float]] = field(default_factory=lambda: {count: [] for count in CONCURRENT})

    def measure(self, prompts: Prompts) -> list[Answer]:
        start = time.perf_counter()
        answers = self.sample(prompts)
        taken = time.perf_counter() - start
        self.rates[len(prompts)].append(sum(len(answer.tokens) for answer in answers) / taken)
        return answers


@dataclass
class Ours:
    """Our engine with its policy, and the differences between its logprobs and the trainer's."""

    policy: Policy
    scheduler: Scheduler
    url: str
    computed: dict[tuple[str, int], int] = field(default_factory=dict)
    """Prompt tokens computed in the last round, by contestant name and number of requests."""
    differences: list[float] = field(default_factory=list)

    def contestant(self, name: str, models: Sequence[str]) -> Contestant:
        return Contestant(name, lambda prompts: self._sample(name, prompts, models))

    def _sample(self, name: str, prompts: Prompts, models: Sequence[str]) -> list[Answer]:
        before = self.scheduler.prompt_tokens_computed
        answers = over_http(self.url, prompts, models)
        self.computed[name, len(prompts)] = self.scheduler.prompt_tokens_computed - before
        return answers

    def compare(self, prompts: Prompts, answers: Sequence[Answer], models: Sequence[str]) -> None:
        """Record the absolute differences between the logprobs of `answers` and the trainer's."""
        for model in models:
            asked = range(list(models).index(model), len(prompts), len(models))
            rows = [_row(prompts[i], answers[i]) for i in asked]
            with self.scheduler.paused(), torch.no_grad():
                found = row_logprobs(self.policy, BASE if model == MODEL else model, rows)
            reported = torch.cat([torch.tensor(answers[i].logprobs) for i in asked])
            self.differences += (found.logprobs[found.mask] - reported).abs().tolist()


def _row(prompt: list[int], answer: Answer) -> TrainingRow:
    return TrainingRow(prompt + answer.tokens, [0] * len(prompt) + [1] * len(answer.tokens), 1.0)


def over_http(url: str, prompts: Prompts, models: Sequence[str]) -> list[Answer]:
    """Send all `prompts` at once, to the `models` in turn."""

    async def ask(client: httpx.AsyncClient, index: int) -> Answer:
        wanted = {"max_tokens": NEW, "temperature": 1.0, "logprobs": 0, "return_token_ids": True}
        body = {"model": models[index % len(models)], "prompt": prompts[index], **wanted}
        response = await client.post(f"{url}/completions", json=body)
        response.raise_for_status()
        (choice,) = response.json()["choices"]
        return Answer(choice["token_ids"], choice["logprobs"]["token_logprobs"])

    async def ask_all() -> list[Answer]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=600, limits=limits) as client:
            return await asyncio.gather(*(ask(client, index) for index in range(len(prompts))))

    return asyncio.run(ask_all())


def generate(model: PreTrainedModel, prompts: Prompts) -> list[Answer]:
    """Sample the whole batch with transformers. All prompts have the same length, so nothing is padded."""
    ids = torch.tensor(prompts)
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": NEW}
    sample: Any = model.generate  # Any: the type checker takes attributes of a module for tensors
    with torch.inference_mode():
        out = sample(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)[:, ids.shape[1] :]
    end = model.generation_config.eos_token_id
    return [Answer(_until(row, end), []) for row in out.tolist()]


def _until(tokens: list[int], end: Any) -> list[int]:
    """`tokens` up to and including the first `end`, or all of them if there is none."""
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


def draw_prompts(source: random.Random, count: int) -> list[list[int]]:
    """Ordinary tokens: the first ids of a vocabulary are special ones."""
    shared = source.choices(range(1000, 40_000), k=SHARED)
    return [shared + source.choices(range(1000, 40_000), k=OWN) for _ in range(count)]


@contextmanager
def open_ours(*, bfloat16: bool) -> Iterator[Ours]:
    model, tokenizer = load_model(model_folder(MODEL))
    if bfloat16:
        use_bfloat16_products(model)
    roles = {role: RoleConfig(lora_r=16) for role in ("planner", "executor")}
    policy = Policy(model, tokenizer, roles, base_name=MODEL, seed=0)
    with torch.no_grad():
        for role in roles:
            for parameter in policy.parameters(role):
                torch.nn.init.normal_(parameter, std=0.02)
    server = AppThread()
    with Scheduler(policy, max_batch=max(CONCURRENT), max_model_len=MAX_MODEL_LEN) as scheduler:
        app = engine_app(scheduler, tokenizer, served_name=MODEL, max_model_len=MAX_MODEL_LEN, default_max_tokens=NEW)
        url = server.add(app)
        with server:
            yield Ours(policy, scheduler, f"{url}/v1")


def run_rounds(
    contestants: Sequence[Contestant], checked: Mapping[str, tuple[Ours, Sequence[str]]], rounds: int
) -> None:
    source = random.Random(0)
    for contestant in contestants:
        contestant.sample(draw_prompts(source, 1))
    for number in range(rounds):
        for count in CONCURRENT:
            prompts = draw_prompts(source, count)
            for contestant in contestants:
                answers = contestant.measure(prompts)
                if contestant.name in checked:
                    ours, models = checked[contestant.name]
                    ours.compare(prompts, answers, models)
            rates = ", ".join(f"{one.name} {one.rates[count][-1]:.0f}" for one in contestants)
            print(f"round {number + 1}, {count} requests, tokens/s: {rates}", file=sys.stderr, flush=True)


def print_table(contestants: Sequence[Contestant]) -> None:
    print(f"| engine | {' | '.join(f'{count} requests, tokens/s' for count in CONCURRENT)} |")
    print(f"|---|{'---:|' * len(CONCURRENT)}")
    for one in contestants:
        rates = [one.rates[count] for count in CONCURRENT]
        cells = [f"{median(found):.0f} ({min(found):.0f} to {max(found):.0f})" for found in rates]
        print(f"| {one.name} | {' | '.join(cells)} |")
    print()


def print_ratios(ours: Contestant, peers: Sequence[Contestant]) -> None:
    for count in CONCURRENT:
        # Ratios are taken within a round: other work on the machine slows all engines of a round alike.
        ratios = [
            own / max(theirs)
            for own, *theirs in zip(ours.rates[count], *(peer.rates[count] for peer in peers), strict=True)
        ]
        met = "met" if median(ratios) >= TARGET else "missed"
        print(
            f"{count} requests: {ours.name} samples {median(ratios):.1f} times as fast as the better of its peers "
            f"({min(ratios):.1f} to {max(ratios):.1f}). The target, {TARGET} times, is {met}.\n"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--without-peers", action="store_true", help="measure only our engine")
    arguments = parser.parse_args()
    disable_progress_bar()
    adapters = ["planner", "executor"]
    print(
        f"Medians of {arguments.rounds} rounds, with the lowest and highest. Python {platform.python_version()}, "
        f"{TORCH}, transformers {version('transformers')}, {VLLM}. {torch.get_num_threads()} threads. "
        f"Load at the start {os.getloadavg()[0]:.1f}.\n"
    )
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        peers: list[Contestant] = []
        if not arguments.without_peers:
            log = Path(folder) / "vllm.log"
            url = stack.enter_context(serve_vllm(model_folder(MODEL), MODEL, log, adapters=False))
            peers.append(Contestant("vLLM", lambda prompts: over_http(url, prompts, [MODEL])))
            plain, _ = load_model(model_folder(MODEL))
            peers.append(Contestant("transformers, generate", lambda prompts: generate(plain, prompts)))
        ours = stack.enter_context(open_ours(bfloat16=False))
        rounded = stack.enter_context(open_ours(bfloat16=True))
        entered = [
            (ours, "agl", [MODEL]),
            (ours, "agl, two adapters", adapters),
            (rounded, "agl, products in bfloat16, two adapters", adapters),
        ]
        own = [engine.contestant(name, models) for engine, name, models in entered]
        checked = {name: (engine, models) for engine, name, models in entered}
        run_rounds([*own, *peers], checked, arguments.rounds)
        print_table([*own, *peers])
        if peers:
            print_ratios(own[0], peers)
        for (name, count), computed in ours.computed.items():
            if count in CONCURRENT:
                sent = count * (SHARED + OWN)
                print(f"{name}, {count} requests: the engine computed {computed:,} of {sent:,} prompt tokens.\n")
        for name, engine in (("float32", ours), ("products in bfloat16", rounded)):
            gaps = sorted(engine.differences)
            print(
                f"Logprobs, {name}: {len(gaps):,} tokens differ from the trainer's by {gaps[-1]:.1g} at most, "
                f"{median(gaps):.1g} in the median.\n"
            )
    print(f"Load at the end {os.getloadavg()[0]:.1f}.")


if __name__ == "__main__":
    main()
