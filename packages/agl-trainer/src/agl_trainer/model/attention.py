"""Attention over a trie of tokens, as an attention implementation of transformers.

In the depth-first layout of `tree.pack_rows` the ancestor mask is a list of rectangles: the keys of a segment are seen
causally by the segment itself and fully by its subtree, which follows it directly. The softmax over all parts of a
query is joined through the log-sum-exp, as in FlashAttention (arXiv 2205.14135). No mask of N x N is ever made and no
key is copied, however many rows share it. On a GPU, where each of many small parts would cost several calls, all of
them are one call with a mask of blocks (`flex`).

A model takes part by `model.set_attn_implementation(NAME)`; every forward passes its `plan`, an `AttentionPlan`.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from agl_trainer.data.prefix_tree import PackedRows, Segment
from agl_trainer.model import flex
from agl_trainer.model.attention_parts import Part, Scores, join, kernel_for, nothing_seen

NAME = "agl_tree"


class AttentionPlan(Protocol):
    """Who attends to whom in one forward pass over N tokens."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """Attention output [Hkv, N, G, D] for query [Hkv, N, G, D] (G query heads share a key head), key and value
        [Hkv, N, D] of the N tokens of this pass."""
        ...


@torch.compiler.disable  # what is compiled serves every layer and every tree of tokens
def _forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    plan: AttentionPlan,
    sliding_window: int | None = None,
    softcap: float | None = None,
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
        Scores(scaling, sliding_window, softcap),
    )
    return out.transpose(0, 1).reshape(batch, length, query_heads, width), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _forward)


class Prefix(Protocol):
    """Tokens [0, end) of every packed row, whose keys and values another pass has made."""

    end: int

    def attended(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values, in pieces [Hkv, M, D] in order."""
        ...


class PackedPlan:
    """Attention for a training pass over packed rows; differentiable. The pass has the tokens behind `prefix`.

    Not a dataclass: FSDP looks into those for tensors, and hands copies of them on to the layers.
    """

    def __init__(
        self,
        rows: PackedRows,
        prefix: Prefix | None = None,
        *,
        record: dict[int, tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """`record`: where each layer leaves the keys and values of this pass."""
        self._rows = rows
        self._prefix = prefix
        self._record = record
        self._masks: dict[int | None, BlockMask] = {}
        """Of each window that layers have: all of them share it, also when they are recomputed."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        if self._record is not None:
            self._record.setdefault(layer, (key, value))  # recomputed ones are not those that were taken
        start = 0
        if self._prefix is not None:
            keys, values = zip(*self._prefix.attended(layer), strict=True)
            key, value, start = torch.cat([*keys, key], 1), torch.cat([*values, value], 1), self._prefix.end
        query = query.transpose(1, 2)
        if flex.takes(query):
            out = flex.attend_masked(query, key, value, self._mask(start, scores.window), scores)
        else:
            out = _TreeAttention.apply(query, key, value, self._rows, start, scores)
        return out.transpose(1, 2)  # type: ignore[no-any-return]  # untyped in torch

    def _mask(self, start: int, window: int | None) -> BlockMask:
        if window not in self._masks:
            self._masks[window] = flex.tree_mask(self._rows, start, window)
        return self._masks[window]


class _TreeAttention(torch.autograd.Function):
    """Output [Hkv, G, M, D] for query [Hkv, G, M, D], key and value [Hkv, N, D]: each part is one call of a kernel.

    The queries are of the last M of the N places, those from `start` on.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, rows: PackedRows, start: int, scores: Scores
    ) -> Tensor:
        kernel = kernel_for(scores, rows.positions)
        out, normaliser = nothing_seen(query)
        for part in _parts(rows.segments, start):
            seen = (slice(None), slice(None), _behind(part.queries, start))
            own, own_normaliser = kernel.forward(part, query[seen], key[:, part.keys], value[:, part.keys])
            join(out[seen], normaliser[seen], own, own_normaliser)
        ctx.save_for_backward(query, key, value, out, normaliser)
        ctx.rows, ctx.start, ctx.kernel = rows, start, kernel
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        query, key, value, out, normaliser = ctx.saved_tensors
        gathered = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for part in _parts(ctx.rows.segments, ctx.start):
            queries = _behind(part.queries, ctx.start)
            seen = (slice(None), slice(None), queries)
            of_part = ctx.kernel.backward(
                part, query[seen], key[:, part.keys], value[:, part.keys], grads[0][seen], out[seen], normaliser[seen]
            )
            for whole, grad, places in zip(gathered, of_part, (queries, part.keys, part.keys), strict=True):
                whole[..., places, :] += grad
        return *gathered, None, None, None


def _parts(segments: Sequence[Segment], start: int) -> Iterator[Part]:
    """What the queries from place `start` on see, a line of descent.

    Children first: what a query sees of its own segment is never nothing, whatever a window hides of the others.
    """
    for segment in reversed(segments):
        if segment.subtree_end <= start:
            continue
        own = slice(max(segment.start, start), segment.end)
        if own.start < own.stop:
            yield Part(own, own, is_causal=True)
            if segment.subtree_end > segment.end:
                yield Part(slice(segment.end, segment.subtree_end), own, is_causal=False)
        if segment.start < start:
            known = slice(segment.start, min(segment.end, start))
            yield Part(slice(start, segment.subtree_end), known, is_causal=False)


def _behind(places: slice, start: int) -> slice:
    return slice(places.start - start, places.stop - start)
