"""From logits to one token for each sequence.

With tens of thousands of tokens to choose from, each pass over [N, V] counts: two are made, one for the distribution
and one for its sums over runs of tokens, and two more where a temperature shapes the draw.
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from agl_trainer.engine.protocol import SampledToken, SamplingParams

_RUN = 256
"""Tokens whose weights are summed before any of them is looked at alone."""


def sample(logits: Tensor, params: Sequence[SamplingParams], sources: Sequence[random.Random]) -> list[SampledToken]:
    """One token for each row of `logits` [N, V], drawn with one uniform number from its source.

    Logprobs are those of the model's own distribution (temperature 1, no nucleus), as the trainer recomputes them.
    """
    logits = logits.float()
    weights = logits.softmax(-1)
    chosen = _choose(logits, weights, params, sources)
    picked = weights.gather(1, chosen[:, None])[:, 0].log().tolist()
    return [
        SampledToken(token, logprob, _top(row, wanted.top_logprobs))
        for token, logprob, row, wanted in zip(chosen.tolist(), picked, weights, params, strict=True)
    ]


def _choose(
    logits: Tensor, weights: Tensor, params: Sequence[SamplingParams], sources: Sequence[random.Random]
) -> Tensor:
    """Tokens [N]; `weights` [N, V] is the softmax of `logits`."""
    still = [index for index, wanted in enumerate(params) if wanted.temperature == 0]
    moving = [index for index, wanted in enumerate(params) if wanted.temperature != 0]
    chosen = torch.empty(len(params), dtype=torch.int64, device=logits.device)
    if still:
        chosen[still] = _rows(logits, still).argmax(-1)
    if moving:
        uniform = torch.tensor([sources[index].random() for index in moving]).to(weights)
        chosen[moving] = _draw(_shaped(logits, weights, moving, params), uniform)
    return chosen


def _shaped(logits: Tensor, weights: Tensor, moving: Sequence[int], params: Sequence[SamplingParams]) -> Tensor:
    """Weights of the rows `moving` as their temperature and nucleus make them."""
    wanted = [params[index] for index in moving]
    if any(one.temperature != 1 for one in wanted):
        temperature = torch.tensor([one.temperature for one in wanted]).to(logits)
        shaped = (_rows(logits, moving) / temperature[:, None]).softmax(-1)
    else:
        shaped = _rows(weights, moving)
    return _nucleus(shaped, wanted)


def _rows(matrix: Tensor, indices: Sequence[int]) -> Tensor:
    """`matrix` itself where `indices` are all its rows: it is large."""
    return matrix if len(indices) == len(matrix) else matrix[list(indices)]


def _draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Inverse CDF: the first token whose cumulated weight exceeds u * total, found by its run and then within it.

    One number a token keeps a seed's sequence the same whatever else is in the batch.
    """
    size = weights.shape[1]
    whole = size - size % _RUN
    sums = weights[:, :whole].unflatten(1, (-1, _RUN)).sum(-1)
    cumulated = torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], 1).cumsum(-1)
    run, before = _first_above(cumulated, uniform[:, None] * cumulated[:, -1:])
    places = run * _RUN + torch.arange(_RUN, device=run.device)
    inside = weights.gather(1, places.clamp(max=size - 1)).masked_fill_(places >= size, 0.0)
    place, _ = _first_above(inside.cumsum(-1), uniform[:, None] * cumulated[:, -1:] - before)
    return (run * _RUN + place)[:, 0]


def _first_above(cumulated: Tensor, aim: Tensor) -> tuple[Tensor, Tensor]:
    """For each row the first place whose cumulated weight exceeds `aim` [N, 1], and what is cumulated before it."""
    total = cumulated[:, -1:]
    # As float32 the number drawn may be 1, and sums in another order differ in their last bits; below the total, some
    # place with weight exceeds it.
    aim = torch.minimum(aim, total.nextafter(torch.zeros_like(total))).clamp(min=0.0)
    place = torch.searchsorted(cumulated, aim, right=True)
    before = cumulated.gather(1, (place - 1).clamp(min=0)).masked_fill_(place == 0, 0.0)
    return place, before


def _nucleus(weights: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Keep the smallest set of tokens whose mass reaches top_p (arXiv 1904.09751)."""
    narrow = [index for index, wanted in enumerate(params) if wanted.top_p < 1]
    if not narrow:
        return weights
    top_p = torch.tensor([params[index].top_p for index in narrow]).to(weights)[:, None]
    ordered, places = weights[narrow].sort(-1, descending=True)
    outside = ordered.cumsum(-1) - ordered >= top_p
    kept = weights.clone()  # the caller reads logprobs from the whole distribution
    kept[narrow] = torch.zeros_like(ordered).scatter_(1, places, ordered.masked_fill_(outside, 0.0))
    return kept


def _top(weights: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    if not count:
        return ()
    values, tokens = weights.topk(count)
    return tuple(zip(tokens.tolist(), values.log().tolist(), strict=True))
