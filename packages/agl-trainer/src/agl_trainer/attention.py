"""Attention over a trie of tokens, as an attention implementation of transformers.

In the depth-first layout of `tree.pack_rows` the ancestor mask is a list of rectangles: the keys of a segment are seen
causally by the segment itself and fully by its subtree, which follows it directly. So each segment is one block

    S = scale * Q[start:subtree_end] K[start:end]^T        (its top square masked to the lower triangle)

and the softmax over all blocks of a query is joined through the log-sum-exp, as in FlashAttention (arXiv 2205.14135).
No mask of N x N is ever made and no key is copied, however many rows share it.

A model takes part by `model.set_attn_implementation(NAME)`; every forward passes its `plan`, an `AttentionPlan`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from agl_trainer.tree import Segment

NAME = "agl_tree"


class AttentionPlan(Protocol):
    """Who attends to whom in one forward pass over N tokens."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention output [Hkv, N, G, D] for query [Hkv, N, G, D] (G query heads share a key head), key and value
        [Hkv, N, D] of the N tokens of this pass."""
        ...


def _forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    plan: AttentionPlan,
    **_: Any,
) -> tuple[Tensor, None]:
    """The seam that transformers calls: query [B, Hq, T, D], key and value [B, Hkv, T, D]; N is B * T."""
    batch, query_heads, length, width = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(batch, kv_heads, query_heads // kv_heads, length, width).permute(1, 0, 3, 2, 4)
    out = plan.attend(
        int(module.layer_idx),  # type: ignore[arg-type]  # an attribute of every attention module of transformers
        grouped.reshape(kv_heads, batch * length, query_heads // kv_heads, width).contiguous(),
        key.transpose(0, 1).reshape(kv_heads, batch * length, width),
        value.transpose(0, 1).reshape(kv_heads, batch * length, width),
        scaling,
    )
    return out.transpose(0, 1).reshape(batch, length, query_heads, width), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _forward)


@dataclass(frozen=True, slots=True)
class Block:
    """Keys and values [Hkv, S, D] that the queries [start, stop) see; causally by the first S of them if `causal`."""

    start: int
    stop: int
    key: Tensor
    value: Tensor
    causal: bool


def attend_blocks(query: Tensor, blocks: Sequence[Block], scale: float) -> tuple[Tensor, Tensor]:
    """Output [Hkv, N, G, D] and log-sum-exp [Hkv, N, G] of `query` over all its blocks.

    A query that no block covers gets 0 and -inf.
    """
    scored = [(block, _scores(query, block, scale)) for block in blocks]
    normaliser = torch.full(query.shape[:3], -torch.inf, dtype=query.dtype, device=query.device)
    for block, scores in scored:
        seen = normaliser[:, block.start : block.stop]
        torch.logaddexp(seen, scores.logsumexp(-1), out=seen)
    out = torch.zeros_like(query)
    for block, scores in scored:
        weights = scores.sub_(normaliser[:, block.start : block.stop, :, None]).exp_()
        _rows(out, block).baddbmm_(weights.flatten(1, 2), block.value)
    return out, normaliser


@dataclass(frozen=True, slots=True)
class PackedPlan:
    """Attention for a training pass over packed rows; differentiable."""

    segments: Sequence[Segment]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return _TreeAttention.apply(query, key, value, self.segments, scale)  # type: ignore[no-any-return]  # untyped in torch


class _TreeAttention(torch.autograd.Function):
    """`attend_blocks` over one trie, with the backward pass of FlashAttention (arXiv 2205.14135, algorithm 4)."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment], scale: float
    ) -> Tensor:
        out, normaliser = attend_blocks(query, _blocks(segments, key, value), scale)
        ctx.save_for_backward(query, key, value, out, normaliser)
        ctx.segments, ctx.scale = segments, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, out, normaliser = ctx.saved_tensors
        grad = grads[0].contiguous()
        delta = (grad * out).sum(-1)
        grad_query, grad_key, grad_value = torch.zeros_like(query), torch.empty_like(key), torch.empty_like(value)
        for segment, block in zip(ctx.segments, _blocks(ctx.segments, key, value), strict=True):
            seen, keys = slice(block.start, block.stop), slice(segment.start, segment.end)
            scores = _scores(query, block, ctx.scale)
            weights = scores.sub_(normaliser[:, seen, :, None]).exp_().flatten(1, 2)
            incoming = _rows(grad, block)
            grad_value[:, keys] = weights.mT @ incoming
            grad_scores = incoming @ block.value.mT
            grad_scores.sub_(delta[:, seen].flatten(1, 2)[..., None]).mul_(weights).mul_(ctx.scale)
            grad_key[:, keys] = grad_scores.mT @ _rows(query, block)
            _rows(grad_query, block).baddbmm_(grad_scores, block.key)
        return grad_query, grad_key, grad_value, None, None


def _blocks(segments: Sequence[Segment], key: Tensor, value: Tensor) -> list[Block]:
    return [
        Block(s.start, s.subtree_end, key[:, s.start : s.end], value[:, s.start : s.end], causal=True) for s in segments
    ]


def _scores(query: Tensor, block: Block, scale: float) -> Tensor:
    """Scaled scores [Hkv, Q, G, S], -inf where a causal block hides the key."""
    length = block.key.shape[1]
    scores = (_rows(query, block) @ block.key.mT).mul_(scale).view(len(query), block.stop - block.start, -1, length)
    if block.causal and length > 1:
        future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu_(1)
        scores[:, :length].masked_fill_(future[:, None], -torch.inf)
    return scores


def _rows(tensor: Tensor, block: Block) -> Tensor:
    """View [Hkv, Q * G, D] of the tokens that see `block`."""
    heads, _, _, width = tensor.shape
    return tensor[:, block.start : block.stop].view(heads, -1, width)
