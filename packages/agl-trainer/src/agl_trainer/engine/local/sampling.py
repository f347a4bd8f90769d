"""Samples one token per sequence from logits.

The vocabulary has tens of thousands of tokens, so passes over [N, V] are costly. There are two, the softmax and its
sums over runs of tokens, and one more if the temperature is not 1.
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from agl_trainer.data.truncation import Truncation, is_left_out
from agl_trainer.engine.protocol import SampledToken, SamplingParams

_RUN = 256
"""Tokens per run. A draw first selects a run by its sum, then a token in it."""


def sample(logits: Tensor, params: Sequence[SamplingParams], rngs: Sequence[random.Random]) -> list[SampledToken]:
    """One token for each row of `logits` [N, V], drawn with one uniform number of its generator.

    Logprobs are those of the distribution that the token was drawn from (vLLM's `processed_logprobs`): after the
    temperature, and of the kept tokens only. For a greedy row they are those of temperature 1.
    """
    logits = _apply_options(logits.float(), params)
    probs = logits.softmax(-1)
    chosen = _choose(logits, probs, params, rngs)
    logprobs = probs.gather(1, chosen[:, None])[:, 0].log().tolist()
    return [
        SampledToken(token, logprob, _top(row, wanted.top_logprobs))
        for token, logprob, row, wanted in zip(chosen.tolist(), logprobs, probs, params, strict=True)
    ]


def _choose(logits: Tensor, probs: Tensor, params: Sequence[SamplingParams], rngs: Sequence[random.Random]) -> Tensor:
    """Token ids [N]; `probs` [N, V] is the softmax of `logits`."""
    greedy = [index for index, wanted in enumerate(params) if wanted.temperature == 0]
    random_rows = [index for index, wanted in enumerate(params) if wanted.temperature != 0]
    chosen = torch.empty(len(params), dtype=torch.int64, device=logits.device)
    if greedy:
        chosen[greedy] = _rows(logits, greedy).argmax(-1)
    if random_rows:
        uniform = torch.tensor([rngs[index].random() for index in random_rows]).to(probs)
        chosen[random_rows] = _draw(_rows(probs, random_rows), uniform)
    return chosen


def _apply_options(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """`logits` divided by the temperature, and -inf for tokens that the options leave out; greedy rows as they are."""
    if any(wanted.temperature not in (0, 1) for wanted in params):
        logits = logits / torch.tensor([[wanted.temperature or 1.0] for wanted in params]).to(logits)
    wanted = {
        index: Truncation(one.top_p, one.top_k, one.min_p) for index, one in enumerate(params) if one.temperature != 0
    }
    narrow = {index: truncation for index, truncation in wanted.items() if truncation != Truncation()}
    if not narrow:
        return logits
    rows = logits[list(narrow)]
    return logits.index_copy(
        0,
        torch.tensor(list(narrow), device=logits.device),
        rows.masked_fill(is_left_out(rows, list(narrow.values())), -torch.inf),
    )


def _rows(matrix: Tensor, indices: Sequence[int]) -> Tensor:
    """Rows `indices` of `matrix`; without a copy if these are all rows."""
    return matrix if len(indices) == len(matrix) else matrix[list(indices)]


def _draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """Inverse CDF: the first token whose cumulative probability exceeds u * total; first its run, then the token in it.

    With one random number per token, a seed gives the same sequence whatever else is in the batch.
    """
    size = probs.shape[1]
    whole = size - size % _RUN
    sums = probs[:, :whole].unflatten(1, (-1, _RUN)).sum(-1)
    cumulated = torch.cat([sums, probs[:, whole:].sum(-1, keepdim=True)], 1).cumsum(-1)
    run, before = _first_above(cumulated, uniform[:, None] * cumulated[:, -1:])
    tokens = run * _RUN + torch.arange(_RUN, device=run.device)
    inside = probs.gather(1, tokens.clamp(max=size - 1)).masked_fill_(tokens >= size, 0.0)
    offset, _ = _first_above(inside.cumsum(-1), uniform[:, None] * cumulated[:, -1:] - before)
    return (run * _RUN + offset)[:, 0]


def _first_above(cumulated: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """For each row, the first index whose cumulative sum exceeds `target` [N, 1], and the sum before that index."""
    total = cumulated[:, -1:]
    # In float32 the uniform number may round to 1, and sums in another order differ in their last bits. Clamped to
    # below the total, some index with a positive probability exceeds the target.
    target = torch.minimum(target, total.nextafter(torch.zeros_like(total))).clamp(min=0.0)
    index = torch.searchsorted(cumulated, target, right=True)
    before = cumulated.gather(1, (index - 1).clamp(min=0)).masked_fill_(index == 0, 0.0)
    return index, before


def _top(probs: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    if not count:
        return ()
    values, tokens = probs.topk(count)
    return tuple(zip(tokens.tolist(), values.log().tolist(), strict=True))
