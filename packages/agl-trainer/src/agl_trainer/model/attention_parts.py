"""What computes a part of an attention: some queries on some keys, joined with other parts by the log-sum-exp.

Both kernels take query [Hkv, G, Q, D] (G query heads share a key head), key and value [Hkv, S, D]. `forward` returns
output and log-sum-exp [Hkv, G, Q] of this part alone, the latter in float32 at least; `backward` takes the output O and
log-sum-exp L of all parts together, with which the gradient of one part needs nothing of the others (FlashAttention,
arXiv 2205.14135, algorithm 4): P = exp(S - L), dS = P * (dP - rowsum(dO * O)).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Gradients = tuple[Tensor, Tensor, Tensor]
"""Of query, key and value, shaped as they are."""


@dataclass(frozen=True, slots=True)
class Scores:
    """How a layer makes scores of queries and keys."""

    scale: float
    window: int | None = None
    """A query sees the keys less than so many positions before it."""
    softcap: float | None = None
    """Scores become softcap * tanh(score / softcap)."""


@dataclass(frozen=True, slots=True)
class Part:
    """Queries at these places see keys at those: all of them, or, where `is_causal`, each up to its own place."""

    queries: slice
    keys: slice
    is_causal: bool


class Kernel(Protocol):
    def forward(self, part: Part, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]: ...

    def backward(
        self, part: Part, query: Tensor, key: Tensor, value: Tensor, grad: Tensor, out: Tensor, normaliser: Tensor
    ) -> Gradients: ...


def kernel_for(scores: Scores, positions: Tensor) -> Kernel:
    """The fastest that computes `scores` of tokens at `positions` [N] where they are."""
    is_plain = scores.window is None and scores.softcap is None
    return FlashKernel(scores.scale) if is_plain and positions.device.type == "cpu" else PlainKernel(scores, positions)


def attend_rows(
    query: Tensor, key: Tensor, value: Tensor, scale: float, *, is_causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output [B, H, Q, D] and log-sum-exp [B, H, Q] of query [B, H, Q, D] on key and value [B, H, S, D].

    `mask` [B, 1, Q, S] is added to the scores; `is_causal`: of Q = S tokens each sees those up to itself.
    """
    if query.device.type == "cpu":
        out, normaliser = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale
        )
        return out, normaliser.view(query.shape[:3])
    scores = (query @ key.mT).float().mul_(scale)
    if is_causal:
        scores.masked_fill_(torch.ones_like(scores, dtype=torch.bool).triu_(1), -torch.inf)
    if mask is not None:
        scores.add_(mask)
    normaliser = scores.logsumexp(-1)
    return scores.sub_(normaliser[..., None]).exp_().to(value) @ value, normaliser


def nothing_seen(query: Tensor) -> tuple[Tensor, Tensor]:
    """Output [..., D] and log-sum-exp [...] of an attention of `query` [..., D] before its first part."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    return torch.zeros_like(query), torch.full(query.shape[:-1], -torch.inf, dtype=dtype, device=query.device)


def join(out: Tensor, normaliser: Tensor, part: Tensor, part_normaliser: Tensor) -> None:
    """Take another part of an attention into `out` [..., D] and its log-sum-exp [...], in place."""
    out.lerp_(part, torch.sigmoid(part_normaliser - normaliser).to(part)[..., None])
    torch.logaddexp(normaliser, part_normaliser, out=normaliser)


@dataclass(frozen=True, slots=True)
class FlashKernel:
    """torch's own for CPUs, which never holds all scores."""

    scale: float

    def forward(self, part: Part, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        heads = _of_heads(key, query), _of_heads(value, query)
        return attend_rows(query, *heads, self.scale, is_causal=part.is_causal)

    def backward(
        self, part: Part, query: Tensor, key: Tensor, value: Tensor, grad: Tensor, out: Tensor, normaliser: Tensor
    ) -> Gradients:
        grad_query, grad_key, grad_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad,
            query,
            _of_heads(key, query),
            _of_heads(value, query),
            out,
            normaliser.contiguous(),
            0.0,
            part.is_causal,
            scale=self.scale,
        )
        return grad_query, grad_key.sum(1), grad_value.sum(1)


@dataclass(frozen=True, slots=True)
class PlainKernel:
    """Matrix products, for any scores on any device. A query that sees no key gets 0 and -inf."""

    scores: Scores
    positions: Tensor

    def forward(self, part: Part, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        made, _ = self._scores(part, query, key)
        normaliser = made.logsumexp(-1)
        return _weights(made, normaliser).to(value) @ value[:, None], normaliser

    def backward(
        self, part: Part, query: Tensor, key: Tensor, value: Tensor, grad: Tensor, out: Tensor, normaliser: Tensor
    ) -> Gradients:
        made, slope = self._scores(part, query, key)
        weights = _weights(made, normaliser)
        delta = (grad * out).sum(-1, keepdim=True)
        grad_scores = (grad @ value[:, None].mT).sub_(delta) * weights.mul(self.scores.scale)
        if slope is not None:
            grad_scores.mul_(slope)
        grad_scores = grad_scores.to(query)
        grad_key, grad_value = grad_scores.mT @ query, weights.to(grad).mT @ grad
        return grad_scores @ key[:, None], grad_key.sum(1), grad_value.sum(1)

    def _scores(self, part: Part, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores [Hkv, G, Q, S], -inf where the key is not seen, and their slope where they are capped."""
        dtype = torch.promote_types(query.dtype, torch.float32)
        made, slope = (query @ key[:, None].mT).to(dtype).mul_(self.scores.scale), None
        if (cap := self.scores.softcap) is not None:
            made = made.div_(cap).tanh_()
            slope = 1 - made.square()
            made.mul_(cap)
        before = self.positions[part.queries, None] - self.positions[None, part.keys]
        hidden = before < 0
        if self.scores.window is not None:
            hidden |= before >= self.scores.window
        return made.masked_fill_(hidden, -torch.inf), slope


def _of_heads(tensor: Tensor, query: Tensor) -> Tensor:
    """View [Hkv, G, S, D] of keys or values [Hkv, S, D]."""
    return tensor[:, None].expand(-1, query.shape[1], -1, -1)


def _weights(scores: Tensor, normaliser: Tensor) -> Tensor:
    return scores.sub_(normaliser.masked_fill(normaliser.isinf(), 0.0)[..., None]).exp_()
