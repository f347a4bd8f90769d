"""The policy gradient of what real vLLM samples equals the analytic one, for each declared limit of the distribution.

As tests/trainer/engine/test_sampled_gradient.py, with SmolLM2's next token after a prompt. Its 49,152 logits move in
`KINDS` groups, each of which earns a reward of its own.
"""

from functools import cache
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from agl_trainer.data.truncation import Truncation, is_left_out
from agl_trainer.engine.vllm.server import VllmServer
from agl_trainer.model.base_model import load_model
from agl_trainer.model.model_folder import model_folder
from tests.trainer.engine.test_sampled_gradient import LARGEST_Z, deviation
from tests.vllm.conftest import BASE

pytestmark = pytest.mark.timeout(2400)  # the first test waits until vLLM is installed and has started

DRAWS, PER_REQUEST = 1000, 500
"""1,000 draws take a quarter of a minute on two cores, 200,000 an hour."""
KINDS = 5
REWARDS = torch.tensor([0.0, 1.0, -0.5, 2.0, 1.0], dtype=torch.float64)
PROMPT = "The best way to"
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"top_p": 0.8},
    {"top_k": 20},
    {"min_p": 0.05},
    {"top_p": 0.9, "top_k": 30, "min_p": 0.01, "temperature": 1.3},
]


@cache
def prompt_and_logits() -> tuple[list[int], Tensor]:
    """Ids of the prompt, and the logits [V] of the token after it."""
    model, tokenizer = load_model(model_folder(BASE))
    ids = tokenizer(PROMPT).input_ids
    with torch.no_grad():
        return ids, model(input_ids=torch.tensor([ids], device=model.device)).logits[0, -1].float().cpu()


def sampled(url: str, settings: dict[str, Any], seed: int) -> list[tuple[int, float]]:
    """Ids and logprobs of tokens that follow the prompt."""
    neutral = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "temperature": 1.0, "max_tokens": 1, "return_token_ids": True}
    asked = {"model": BASE, "prompt": prompt_and_logits()[0], "n": PER_REQUEST, "logprobs": 0, "seed": seed}
    answer = httpx.post(f"{url}/completions", json=neutral | asked | settings, timeout=600)
    choices = answer.raise_for_status().json()["choices"]
    return [(choice["token_ids"][0], choice["logprobs"]["token_logprobs"][0]) for choice in choices]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_sampled_gradient_is_that_of_the_truncated_distribution(vllm_url: str, settings: dict[str, Any]) -> None:
    drawn = [pair for request in range(DRAWS // PER_REQUEST) for pair in sampled(vllm_url, settings, 1000 * request)]
    limits = {name: value for name, value in settings.items() if name != "temperature"}
    logits = prompt_and_logits()[1].double()[None] / settings.get("temperature", 1.0)
    left_out = is_left_out(logits, [Truncation(**limits)])
    logprobs = logits.masked_fill(left_out, -torch.inf).log_softmax(-1)[0]

    tokens, recorded = torch.tensor([token for token, _ in drawn]), torch.tensor([value for _, value in drawn]).double()
    assert (logprobs[tokens] - recorded).abs().max() < 1e-3, "the trainer keeps the tokens that vLLM keeps"
    kinds = torch.arange(logprobs.shape[0]) % KINDS
    probs = torch.zeros(KINDS, dtype=torch.float64).index_add_(0, kinds, logprobs.exp())
    ratios = (logprobs[tokens] - recorded).exp()
    earned = (ratios * REWARDS[kinds[tokens]])[:, None] * (one_hot(kinds[tokens], KINDS) - probs)
    temperature = settings.get("temperature", 1.0)
    assert deviation(earned / temperature, probs * (REWARDS - probs @ REWARDS) / temperature) < LARGEST_Z


def test_the_server_says_by_its_answers_which_logprobs_it_records(vllm_url: str) -> None:
    with VllmServer(vllm_url) as server:
        assert server.logprobs_mode(BASE, prompt_and_logits()[0][0]) == "processed_logprobs"
