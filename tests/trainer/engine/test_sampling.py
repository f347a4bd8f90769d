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
    ],
)
def test_tokens_have_the_expected_frequencies(options: dict[str, float], weights: list[float]) -> None:
    assert chi_square(drawn(options), weights) < 18.5  # 0.1 % point of chi square with 4 degrees of freedom


def test_the_nucleus_does_not_depend_on_the_order_of_the_tokens() -> None:
    tokens = drawn({"top_p": 0.6}, LOGITS.flip(0))
    assert {token.token_id for token in tokens} == {3, 4}


@pytest.mark.parametrize("options", [{}, {"top_p": 0.6}, {"temperature": 0.3}])
def test_logprobs_are_those_of_the_full_distribution(options: dict[str, float]) -> None:
    for token in drawn(options)[:20]:
        assert token.logprob == pytest.approx(math.log(WEIGHTS[token.token_id]), abs=1e-6)


def test_tempered_logprobs_are_those_after_the_temperature() -> None:
    settings = [params(), params(temperature=0.5), params(temperature=0.0), params(temperature=0.5, top_p=0.6)]
    rngs = [random.Random(seed) for seed in range(4)]
    tokens = sample(LOGITS.expand(4, -1), settings, rngs, is_tempered=True)
    squares = [weight**2 for weight in WEIGHTS]
    tempered = [weight / sum(squares) for weight in squares]
    for token, weights in zip(tokens, [WEIGHTS, tempered, WEIGHTS, tempered], strict=True):
        assert token.logprob == pytest.approx(math.log(weights[token.token_id]), abs=1e-6)
    assert tokens[0].token_id == sample(LOGITS[None], settings[:1], [random.Random(0)])[0].token_id


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
        LOGITS.expand(2, -1), [SamplingParams(1, top_p=0.1, top_logprobs=2), params()], [Fixed(0.9), Fixed(0.9)]
    )
    assert two.top == ((0, pytest.approx(math.log(0.4))), (1, pytest.approx(math.log(0.25))))
    assert none.top == ()
