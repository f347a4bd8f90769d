"""Sampling from logits: the distribution of the tokens, edge cases, and reported logprobs."""

import math
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from agl_trainer.engine.local.sampling import sample
from agl_trainer.engine.protocol import SampledToken, SamplingParams

WEIGHTS = [0.4, 0.25, 0.2, 0.1, 0.05]
LOGITS = torch.tensor(WEIGHTS).log() + 3.0
"""Logits of `WEIGHTS`, shifted by a constant."""
DRAWS = 4000


class Fixed(random.Random):
    """Always returns the same number."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number

    def random(self) -> float:
        return self.number


def params(**options: float) -> SamplingParams:
    return SamplingParams(max_tokens=1, **options)  # type: ignore[arg-type]  # options are fields of it


def drawn(options: dict[str, float], logits: Tensor = LOGITS) -> list[SampledToken]:
    """Many draws from one distribution, each with its own generator."""
    sources = [random.Random(seed) for seed in range(DRAWS)]
    return sample(logits.expand(DRAWS, -1), [params(**options)] * DRAWS, sources)


def chi_square(tokens: Sequence[SampledToken], weights: Sequence[float]) -> float:
    """Pearson's statistic of the counts of `tokens` against `weights`. Fails if a token of weight 0 was drawn."""
    counts = torch.bincount(torch.tensor([token.token_id for token in tokens]), minlength=len(weights))
    expected = torch.tensor(weights) / sum(weights) * len(tokens)
    assert counts[expected == 0].sum() == 0
    seen = expected > 0
    return ((counts - expected)[seen] ** 2 / expected[seen]).sum().item()


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, WEIGHTS),
        ({"temperature": 2.0}, [math.sqrt(weight) for weight in WEIGHTS]),
        ({"temperature": 0.5}, [weight**2 for weight in WEIGHTS]),
        ({"top_p": 0.6}, [0.4, 0.25, 0, 0, 0]),
        ({"top_p": 0.7}, [0.4, 0.25, 0.2, 0, 0]),
        ({"top_p": 0.001}, [1, 0, 0, 0, 0]),
        # The nucleus is that of the tempered distribution: 0.51, 0.20, 0.13, ...
        ({"top_p": 0.6, "temperature": 0.5}, [0.16, 0.0625, 0, 0, 0]),
        ({"top_k": 2}, [0.4, 0.25, 0, 0, 0]),
        ({"top_k": 9}, WEIGHTS),
        ({"min_p": 0.3}, [0.4, 0.25, 0.2, 0, 0]),
        # First min_p (three tokens), then top_k, then top_p: 0.47 of the three tokens is the first alone.
        ({"min_p": 0.3, "top_p": 0.46}, [1, 0, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.48}, [0.4, 0.25, 0, 0, 0]),
    ],
)
def test_tokens_have_the_expected_frequencies(options: dict[str, float], weights: list[float]) -> None:
    assert chi_square(drawn(options), weights) < 18.5  # 0.1 % point of chi square with 4 degrees of freedom


def test_the_nucleus_does_not_depend_on_the_order_of_the_tokens() -> None:
    tokens = drawn({"top_p": 0.6}, LOGITS.flip(0))
    assert {token.token_id for token in tokens} == {3, 4}


def test_logprobs_are_those_of_the_distribution_that_was_sampled() -> None:
    """After the temperature, and of the kept tokens only; at temperature 0 those of temperature 1."""
    squares = [weight**2 for weight in WEIGHTS]
    for options, weights in (
        ({}, WEIGHTS),
        ({"temperature": 0.5}, squares),
        ({"temperature": 0.5, "top_p": 0.6}, squares[:2]),
        ({"min_p": 0.5}, WEIGHTS[:3]),
        ({"temperature": 0.0, "top_k": 2}, WEIGHTS),
    ):
        for token in drawn(options)[:20]:
            expected = math.log(weights[token.token_id] / sum(weights))
            assert token.logprob == pytest.approx(expected, abs=1e-6)


def test_temperature_zero_is_greedy_and_draws_no_number() -> None:
    sources = [random.Random(1), random.Random(2)]
    tokens = sample(LOGITS.flip(0).expand(2, -1), [params(temperature=0.0), params()], sources)
    assert tokens[0].token_id == 4
    assert tokens[0].logprob == pytest.approx(math.log(0.4), abs=1e-6)
    assert sources[0].random() == random.Random(1).random()
    assert sources[1].random() != random.Random(2).random()
    (alone,) = sample(LOGITS[None], [params(temperature=0.0)], [random.Random(1)])
    assert alone.token_id == 0


def test_a_draw_does_not_depend_on_the_rest_of_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(30, 50, generator=generator)
    asked = [params(temperature=0.5 + 0.5 * (i % 3), top_p=1.0 if i % 2 else 0.8) for i in range(30)]
    together = sample(logits, asked, [random.Random(seed) for seed in range(30)])
    alone = [sample(logits[i : i + 1], asked[i : i + 1], [random.Random(i)])[0] for i in range(30)]
    assert [token.token_id for token in together] == [token.token_id for token in alone]
    assert len({token.token_id for token in together}) > 10


@pytest.mark.parametrize("number", [0.0, math.nextafter(1.0, 0.0)])
def test_the_ends_of_the_unit_interval_draw_only_tokens_with_weight(number: float) -> None:
    """As float32 the largest random number is 1, which no cumulated weight exceeds."""
    logits = torch.tensor([-torch.inf, -torch.inf, 0.0, 1.0, 2.0, -torch.inf, -torch.inf])
    (token,) = sample(logits[None], [params()], [Fixed(number)])
    assert token.token_id == (4 if number else 2)
    (token,) = sample(logits[None], [params(top_p=0.8)], [Fixed(number)])
    assert token.token_id == (4 if number else 3)


def test_alternatives_are_the_most_likely_tokens_in_order() -> None:
    two, none = sample(
        LOGITS.expand(2, -1), [SamplingParams(1, top_k=2, top_logprobs=2), params()], [Fixed(0.9), Fixed(0.9)]
    )
    assert two.top == ((0, pytest.approx(math.log(0.4 / 0.65))), (1, pytest.approx(math.log(0.25 / 0.65))))
    assert none.top == ()
