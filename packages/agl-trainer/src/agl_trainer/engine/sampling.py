"""From logits to one token for each sequence."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from agl_trainer.engine.request import SampledToken, SamplingParams


def sample(logits: Tensor, params: Sequence[SamplingParams], sources: Sequence[random.Random]) -> list[SampledToken]:
    """One token for each row of `logits` [N, V], drawn with one uniform number from its source.

    Logprobs are those of the model's own distribution (temperature 1, no nucleus), as the trainer recomputes them.
    """
    logprobs = logits.float().log_softmax(-1)
    chosen = _draw(logprobs, params, sources)
    picked = logprobs.gather(1, chosen[:, None])[:, 0].tolist()
    return [
        SampledToken(token, logprob, _top(row, wanted.top_logprobs))
        for token, logprob, row, wanted in zip(chosen.tolist(), picked, logprobs, params, strict=True)
    ]


def _draw(logprobs: Tensor, params: Sequence[SamplingParams], sources: Sequence[random.Random]) -> Tensor:
    greedy = [wanted.temperature == 0 for wanted in params]
    if all(greedy):
        return logprobs.argmax(-1)
    temperature = torch.tensor([wanted.temperature or 1.0 for wanted in params])
    uniform = torch.tensor([0.0 if still else source.random() for still, source in zip(greedy, sources, strict=True)])
    weights = _nucleus((logprobs / temperature.to(logprobs)[:, None]).softmax(-1), params)
    # Inverse CDF: the first token whose cumulated weight exceeds u * total. One number a token keeps a seed's
    # sequence the same whatever else is in the batch.
    cumulated = weights.cumsum(-1)
    total = cumulated[:, -1:]
    # As float32 the number may be 1; below the total, some token with weight exceeds it.
    aim = torch.minimum(uniform.to(cumulated)[:, None] * total, total.nextafter(torch.zeros_like(total)))
    drawn = torch.searchsorted(cumulated, aim, right=True)[:, 0]
    return torch.where(torch.tensor(greedy, device=drawn.device), logprobs.argmax(-1), drawn)


def _nucleus(weights: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Keep the smallest set of tokens whose mass reaches top_p (arXiv 1904.09751)."""
    narrow = [index for index, wanted in enumerate(params) if wanted.top_p < 1]
    if narrow:
        top_p = torch.tensor([params[index].top_p for index in narrow]).to(weights)[:, None]
        ordered, places = weights[narrow].sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p
        weights[narrow] = torch.zeros_like(ordered).scatter_(1, places, ordered.masked_fill_(outside, 0.0))
    return weights


def _top(logprobs: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    if not count:
        return ()
    values, tokens = logprobs.topk(count)
    return tuple(zip(tokens.tolist(), values.tolist(), strict=True))
