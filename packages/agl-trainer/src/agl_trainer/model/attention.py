"""Attention over a prefix tree of tokens, registered with transformers as an attention implementation.

In the depth-first layout of `prefix_tree.pack_rows` the ancestor mask is a list of rectangles: a segment's own queries
see its keys causally, and the queries of its subtree, which follows it directly, see all of its keys. Each rectangle is
one attention block; blocks are merged through their log-sum-exp, as in FlashAttention (arXiv 2205.14135). No N x N mask
is made and no key is copied, however many rows share it. On a GPU, where many small blocks would each cost several
kernel launches, one call with a block mask computes all of them (`flex_attention`).

A model uses it after `model.set_attn_implementation(NAME)`; every forward pass takes an `AttentionPlan` as `plan`.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from agl_trainer.data.prefix_tree import PackedRows, Segment
from agl_trainer.model import flex_attention
from agl_trainer.model.block_attention import AttentionBlock, ScoreOptions, choose_backend, empty_attention, merge_block

NAME = "agl_tree"


class AttentionPlan(Protocol):
    """The tokens that each of the N tokens of one forward pass attends to."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions) -> Tensor:
        """Attention output [Hkv, N, G, D] for query [Hkv, N, G, D] (G query heads share a key head), key and value
        [Hkv, N, D] of the N tokens of this pass."""
        ...


@torch.compiler.disable  # so that the compiled code of a layer serves every layer and every tree
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
    """Called by transformers with query [B, Hq, T, D], key and value [B, Hkv, T, D]; N is B * T."""
    batch, query_heads, length, width = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(batch, kv_heads, query_heads // kv_heads, length, width).permute(1, 0, 3, 2, 4)
    out = plan.attend(
        int(module.layer_idx),  # type: ignore[arg-type]  # an attribute of every attention module of transformers
        grouped.reshape(kv_heads, batch * length, query_heads // kv_heads, width).contiguous(),
        key.transpose(0, 1).reshape(kv_heads, batch * length, width),
        value.transpose(0, 1).reshape(kv_heads, batch * length, width),
        ScoreOptions(scaling, sliding_window, softcap),
    )
    return out.transpose(0, 1).reshape(batch, length, query_heads, width), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _forward)


class Prefix(Protocol):
    """Tokens [0, end) of every packed row, whose keys and values come from an earlier pass."""

    end: int

    def attended(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values in consecutive pieces [Hkv, M, D]."""
        ...


class PackedPlan:
    """Differentiable attention of a training pass over packed rows. The pass has the tokens after `prefix`.

    Not a dataclass: FSDP searches dataclasses for tensors and would pass copies of them to the layers.
    """

    def __init__(
        self, rows: PackedRows, prefix: Prefix | None = None, *, record: dict[int, tuple[Tensor, Tensor]] | None = None
    ) -> None:
        """`record`: filled with the keys and values of this pass, by layer."""
        self._rows = rows
        self._prefix = prefix
        self._record = record
        self._masks: dict[int | None, BlockMask] = {}
        """By window; layers with the same window share a mask, also when they are recomputed."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions) -> Tensor:
        if self._record is not None:
            self._record.setdefault(layer, (key, value))  # recomputation must not replace the first ones
        start = 0
        if self._prefix is not None:
            keys, values = zip(*self._prefix.attended(layer), strict=True)
            key, value, start = torch.cat([*keys, key], 1), torch.cat([*values, value], 1), self._prefix.end
        query = query.transpose(1, 2)
        if flex_attention.is_supported(query):
            out = flex_attention.attend(query, key, value, self._mask(start, options.window), options)
        else:
            out = _TreeAttention.apply(query, key, value, self._rows, start, options)
        return out.transpose(1, 2)  # type: ignore[no-any-return]  # untyped in torch

    def _mask(self, start: int, window: int | None) -> BlockMask:
        if window not in self._masks:
            self._masks[window] = flex_attention.tree_mask(self._rows, start, window)
        return self._masks[window]


class _TreeAttention(torch.autograd.Function):
    """Output [Hkv, G, M, D] for query [Hkv, G, M, D], key and value [Hkv, N, D]: one backend call per block.

    The queries belong to the last M of the N tokens, those from index `start` on.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, rows: PackedRows, start: int, options: ScoreOptions
    ) -> Tensor:
        backend = choose_backend(options, rows.positions)
        out, lse = empty_attention(query)
        for block in _blocks(rows.segments, start):
            index = (slice(None), slice(None), _shift(block.queries, start))
            block_out = backend.forward(block, query[index], key[:, block.keys], value[:, block.keys])
            merge_block(out[index], lse[index], *block_out)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.rows, ctx.start, ctx.backend = rows, start, backend
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        query, key, value, out, lse = ctx.saved_tensors
        totals = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for block in _blocks(ctx.rows.segments, ctx.start):
            queries, keys = _shift(block.queries, ctx.start), block.keys
            index = (slice(None), slice(None), queries)
            block_grads = ctx.backend.backward(
                block, query[index], key[:, keys], value[:, keys], grads[0][index], out[index], lse[index]
            )
            for total, grad, tokens in zip(totals, block_grads, (queries, keys, keys), strict=True):
                total[..., tokens, :] += grad
        return *totals, None, None, None


def _blocks(segments: Sequence[Segment], start: int) -> Iterator[AttentionBlock]:
    """Blocks that the queries from index `start` on see, child segments before their parents.

    So the first block of a query is its own segment, of which it always sees a key, even if a window hides all others.
    """
    for segment in reversed(segments):
        if segment.subtree_end <= start:
            continue
        own = slice(max(segment.start, start), segment.end)
        if own.start < own.stop:
            yield AttentionBlock(own, own, is_causal=True)
            if segment.subtree_end > segment.end:
                yield AttentionBlock(slice(segment.end, segment.subtree_end), own, is_causal=False)
        if segment.start < start:
            prefix = slice(segment.start, min(segment.end, start))
            yield AttentionBlock(slice(start, segment.subtree_end), prefix, is_causal=False)


def _shift(tokens: slice, start: int) -> slice:
    """Token indices as indices of queries, which begin at token `start`."""
    return slice(tokens.start - start, tokens.stop - start)
