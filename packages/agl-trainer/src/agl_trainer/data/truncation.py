"""The tokens that top_p, top_k and min_p leave out. The engine and the trainer must agree on them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Truncation(NamedTuple):
    """Limits a distribution to its likeliest tokens; by default to all."""

    top_p: float = 1.0
    top_k: int = 0
    """0: all."""
    min_p: float = 0.0


def is_left_out(logits: Tensor, truncations: Sequence[Truncation]) -> Tensor:
    """Mask [N, V] of the tokens that the truncation of each row of `logits` [N, V] leaves out. In vLLM's order:

    1. min_p (arXiv 2407.01082): tokens less likely than min_p times the likeliest
    2. top_k: all but the k likeliest
    3. top_p (arXiv 1904.09751): of the others, all but the fewest likeliest whose probabilities reach top_p
    """
    top_p, top_k, min_p = logits.new_tensor(truncations)[:, :, None].unbind(1)
    ordered, tokens = logits.sort(-1, descending=True)
    outside = ordered < ordered[:, :1] + min_p.log()
    outside |= (torch.arange(logits.shape[1], device=logits.device) >= top_k) & (top_k > 0)
    probs = ordered.masked_fill(outside, -torch.inf).softmax(-1)
    outside |= (probs.cumsum(-1) - probs >= top_p) & (top_p < 1)
    return torch.empty_like(outside).scatter_(1, tokens, outside)
