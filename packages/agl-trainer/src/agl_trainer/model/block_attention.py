"""Attention of a block of queries on a block of keys; blocks are merged through their log-sum-exp (LSE).

Every backend takes query [Hkv, G, Q, D] (G query heads share a key head), key and value [Hkv, S, D]. `forward` returns
the output and the LSE [Hkv, G, Q] of this block alone, the LSE in float32 or wider. `backward` takes the output O and
the LSE L of all merged blocks; with these, the gradient of one block does not depend on the others (FlashAttention,
arXiv 2205.14135, algorithm 4): P = exp(S - L), dS = P * (dP - rowsum(dO * O)).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Gradients = tuple[Tensor, Tensor, Tensor]
"""Gradients of query, key and value, in their shapes."""


@dataclass(frozen=True, slots=True)
class ScoreOptions:
    """How a layer computes attention scores."""

    scale: float
    window: int | None = None
    """A query at position p sees keys at positions greater than p - window."""
    softcap: float | None = None
    """Scores become softcap * tanh(score / softcap)."""


@dataclass(frozen=True, slots=True)
class AttentionBlock:
    """Token ranges of queries and keys. Each query sees all keys or, if `is_causal`, those up to its own index."""

    queries: slice
    keys: slice
    is_causal: bool


class AttentionBackend(Protocol):
    def forward(self, block: AttentionBlock, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]: ...

    def backward(
        self, block: AttentionBlock, query: Tensor, key: Tensor, value: Tensor, grad: Tensor, out: Tensor, lse: Tensor
    ) -> Gradients: ...


def choose_backend(options: ScoreOptions, positions: Tensor) -> AttentionBackend:
    """The fastest backend for `options` on the device of `positions` [N]."""
    is_plain = options.window is None and options.softcap is None
    if is_plain and positions.device.type == "cpu":
        return FlashBackend(options.scale)
    return MatmulBackend(options, positions)


def attention_with_lse(
    query: Tensor, key: Tensor, value: Tensor, scale: float, *, is_causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output [B, H, Q, D] and LSE [B, H, Q] of query [B, H, Q, D] on key and value [B, H, S, D].

    `mask` [B, 1, Q, S] is added to the scores. `is_causal` requires Q = S.
    """
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale
        )
        return out, lse.view(query.shape[:3])
    scores = (query @ key.mT).float().mul_(scale)
    if is_causal:
        scores.masked_fill_(torch.ones_like(scores, dtype=torch.bool).triu_(1), -torch.inf)
    if mask is not None:
        scores.add_(mask)
    lse = scores.logsumexp(-1)
    return scores.sub_(lse[..., None]).exp_().to(value) @ value, lse


def empty_attention(query: Tensor) -> tuple[Tensor, Tensor]:
    """Output [..., D] and LSE [...] of `query` [..., D] on no keys: 0 and -inf, to merge blocks into."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    return torch.zeros_like(query), torch.full(query.shape[:-1], -torch.inf, dtype=dtype, device=query.device)


def merge_block(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Merge a block's attention into `out` [..., D] and `lse` [...], in place."""
    out.lerp_(block_out, torch.sigmoid(block_lse - lse).to(block_out)[..., None])
    torch.logaddexp(lse, block_lse, out=lse)


@dataclass(frozen=True, slots=True)
class FlashBackend:
    """torch's flash attention for CPUs, which never materializes all scores."""

    scale: float

    def forward(self, block: AttentionBlock, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        expanded = _expand_heads(key, query), _expand_heads(value, query)
        return attention_with_lse(query, *expanded, self.scale, is_causal=block.is_causal)

    def backward(
        self, block: AttentionBlock, query: Tensor, key: Tensor, value: Tensor, grad: Tensor, out: Tensor, lse: Tensor
    ) -> Gradients:
        expanded = _expand_heads(key, query), _expand_heads(value, query)
        grad_query, grad_key, grad_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, *expanded, out, lse.contiguous(), 0.0, block.is_causal, scale=self.scale
        )
        return grad_query, grad_key.sum(1), grad_value.sum(1)


@dataclass(frozen=True, slots=True)
class MatmulBackend:
    """Attention by matrix products, for any score options on any device. A query without keys gets 0 and -inf."""

    options: ScoreOptions
    positions: Tensor

    def forward(self, block: AttentionBlock, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        scores, _ = self._scores(block, query, key)
        lse = scores.logsumexp(-1)
        return _probabilities(scores, lse).to(value) @ value[:, None], lse

    def backward(
        self, block: AttentionBlock, query: Tensor, key: Tensor, value: Tensor, grad: Tensor, out: Tensor, lse: Tensor
    ) -> Gradients:
        scores, slope = self._scores(block, query, key)
        probabilities = _probabilities(scores, lse)
        delta = (grad * out).sum(-1, keepdim=True)
        grad_scores = (grad @ value[:, None].mT).sub_(delta) * probabilities.mul(self.options.scale)
        if slope is not None:
            grad_scores.mul_(slope)
        grad_scores = grad_scores.to(query)
        grad_key, grad_value = grad_scores.mT @ query, probabilities.to(grad).mT @ grad
        return grad_scores @ key[:, None], grad_key.sum(1), grad_value.sum(1)

    def _scores(self, block: AttentionBlock, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores [Hkv, G, Q, S], -inf for hidden keys, and the derivative of the softcap if there is one."""
        dtype = torch.promote_types(query.dtype, torch.float32)
        scores, slope = (query @ key[:, None].mT).to(dtype).mul_(self.options.scale), None
        if (cap := self.options.softcap) is not None:
            scores = scores.div_(cap).tanh_()
            slope = 1 - scores.square()
            scores.mul_(cap)
        distance = self.positions[block.queries, None] - self.positions[None, block.keys]
        hidden = distance < 0
        if self.options.window is not None:
            hidden |= distance >= self.options.window
        return scores.masked_fill_(hidden, -torch.inf), slope


def _expand_heads(tensor: Tensor, query: Tensor) -> Tensor:
    """View [Hkv, G, S, D] of keys or values [Hkv, S, D]."""
    return tensor[:, None].expand(-1, query.shape[1], -1, -1)


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse), in place; 0 if no key is seen (lse = -inf)."""
    return scores.sub_(lse.masked_fill(lse.isinf(), 0.0)[..., None]).exp_()
