"""The policy gradient of what the in-process engine samples equals the analytic one, in each setting that may train.

The tokens of a vocabulary of five earn `REWARDS`. With logits L and p the softmax of L / T over the kept tokens, the
gradient of the expected reward is dJ/dL_i = p_i (r_i - sum_j p_j r_j) / T. Its estimate is the mean over draws of
rho r d logprob / dL, where rho is exp(logprob now - logprob as recorded by the engine); the trainer computes both.
"""

import math
import random
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from agl_trainer.compute.logprobs import TokenLogprobs
from agl_trainer.data.truncation import Truncation
from agl_trainer.engine.local.sampling import sample
from agl_trainer.engine.protocol import SampledToken, SamplingParams

DRAWS = 200_000
LARGEST_Z = 4.5
"""Standard errors: exceeded by chance in 7 of 10^6 components."""
PROBS = (0.4, 0.25, 0.2, 0.1, 0.05)
LOGITS = tuple(math.log(prob) for prob in PROBS)
STEP = torch.tensor([0.3, -0.2, 0.1, 0.0, -0.4])
"""Change of the logits since the engine sampled."""
REWARDS = torch.tensor([0.0, 1.0, -0.5, 2.0, 1.0], dtype=torch.float64)
STOP = 4
"""The token that ends an answer of up to two tokens."""


@cache
def draws(logits: tuple[float, ...], settings: tuple[tuple[str, float], ...] = ()) -> tuple[Tensor, Tensor]:
    """Ids and logprobs of `DRAWS` tokens with one generator."""
    params = SamplingParams(max_tokens=1, **dict(settings))  # type: ignore[arg-type]  # settings are fields of it
    rows = torch.tensor(logits).expand(DRAWS, -1)
    tokens = sample(rows, [params] * DRAWS, [random.Random(len(settings))] * DRAWS)
    return ids(tokens), torch.tensor([token.logprob for token in tokens], dtype=torch.float64)


def ids(tokens: list[SampledToken]) -> Tensor:
    return torch.tensor([token.token_id for token in tokens])


def deviation(terms: Tensor, expected: Tensor) -> float:
    """Largest distance of the means of `terms` [N, K] from `expected` [K], in standard errors."""
    errors = (terms.std(0) / len(terms) ** 0.5).clamp(min=1e-6)
    return ((terms.mean(0) - expected) / errors).abs().max().item()


def trained(step: Tensor, settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Logprob [5] of each token as the trainer computes it with `settings`, and its gradient [5, 5] by the logits."""
    temperature = settings.get("temperature", 1.0)
    truncation = Truncation(**{name: value for name, value in settings.items() if name != "temperature"})
    logits = (torch.tensor(LOGITS) + step).double().expand(5, -1).clone().requires_grad_()
    temperatures = torch.full((5,), temperature, dtype=torch.float64)
    identity = torch.eye(5, dtype=torch.float64)
    logprobs, _ = TokenLogprobs.apply(logits, identity, None, torch.arange(5), temperatures, truncation, False)
    (scores,) = torch.autograd.grad(logprobs.sum(), logits)
    return logprobs.detach(), scores


def gradient_deviation(settings: dict[str, Any], step: Tensor, trained_with: dict[str, Any]) -> float:
    """Deviation of the gradient that the trainer computes from the analytic one, for tokens sampled with `settings`."""
    chosen, recorded = draws(LOGITS, tuple(settings.items()))
    logprobs, scores = trained(step, trained_with)
    ratios = (logprobs[chosen] - recorded).exp()
    kept = torch.zeros(5, dtype=torch.float64).index_fill(0, chosen.unique() if trained_with else torch.arange(5), 1.0)
    temperature = trained_with.get("temperature", 1.0)
    probs = ((torch.tensor(LOGITS) + step).double() / temperature).softmax(-1) * kept
    probs /= probs.sum()
    analytic = probs * (REWARDS - probs @ REWARDS) / temperature
    return deviation((ratios * REWARDS[chosen])[:, None] * scores[chosen], analytic)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
def test_the_sampled_gradient_is_the_analytic_one_also_off_policy(temperature: float) -> None:
    settings = {"temperature": temperature}
    assert gradient_deviation(settings, STEP, settings) < LARGEST_Z


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"temperature": 0.7}, 5),
        ({"temperature": 1.5}, 5),
        ({"top_p": 0.7}, 3),
        ({"top_k": 3}, 3),
        ({"min_p": 0.3}, 3),
        ({"top_p": 0.9, "temperature": 1.5}, 4),
        ({"top_p": 0.95, "top_k": 4, "min_p": 0.2, "temperature": 0.7}, 3),
    ],
)
def test_the_sampled_gradient_is_that_of_the_truncated_distribution(settings: dict[str, Any], kept: int) -> None:
    assert len(draws(LOGITS, tuple(settings.items()))[0].unique()) == kept
    assert gradient_deviation(settings, torch.zeros(5), settings) < LARGEST_Z


@pytest.mark.parametrize("settings", [{"top_p": 0.7}, {"top_k": 3}, {"min_p": 0.3}, {"temperature": 0.0}])
def test_settings_that_the_trainer_does_not_apply_would_bias_it(settings: dict[str, Any]) -> None:
    assert gradient_deviation(settings, torch.zeros(5), {}) > 5 * LARGEST_Z


def test_a_stop_does_not_bias_it() -> None:
    """The number of tokens is random, and yet the sum over the sampled ones is the gradient of the expected reward."""
    logits = torch.tensor([LOGITS, LOGITS[::-1]])  # of the first token, and of the second
    earned = torch.arange(25, dtype=torch.float64).reshape(5, 5).sin()  # by both tokens; after a stop: column 0
    first, _ = draws(LOGITS, (("temperature", 1.0),))
    goes_on = first != STOP
    second = draws(LOGITS[::-1])[0].where(goes_on, 0)
    hot = one_hot(torch.stack([first, second], 1), 5)
    scores = (hot - logits.double().softmax(-1)) * torch.stack([torch.ones(DRAWS), goes_on], 1)[:, :, None]
    estimated = earned[first, second][:, None, None] * scores

    variable = logits.double().requires_grad_()
    p, q = variable.softmax(-1)
    expected = torch.stack([p[a] * (earned[a, 0] if a == STOP else q @ earned[a]) for a in range(5)]).sum()
    (analytic,) = torch.autograd.grad(expected, variable)
    assert deviation(estimated.flatten(1), analytic.flatten()) < LARGEST_Z


def test_choices_of_one_request_are_independent_draws() -> None:
    """The engine samples choice i of a request with the seed + i, and the gateway's seeds are hashes."""
    seeds = random.Random(8).sample(range(2**31), 2000)
    both = [
        ids(
            sample(
                torch.tensor(LOGITS).expand(2, -1),
                [SamplingParams(1)] * 2,
                [random.Random(seed), random.Random(seed + 1)],
            )
        )
        for seed in seeds
    ]
    chosen = torch.stack(both)
    counts = torch.zeros(5, 5).index_put_((chosen[:, 0], chosen[:, 1]), torch.ones(len(both)), accumulate=True)
    expected = torch.outer(torch.tensor(PROBS), torch.tensor(PROBS)) * len(both)
    assert ((counts - expected) ** 2 / expected).sum() < 51.2  # 0.1 % point of chi square with 24 degrees of freedom
