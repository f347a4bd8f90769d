"""Attention over a prefix tree of tokens on a GPU by FlexAttention (arXiv 2412.05496): one kernel with a block mask.

A query sees the keys of its own row up to itself: keys that come no later in the packed order and whose segment's
subtree contains the query.
"""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor
from torch._dynamo import config as compiler
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

from agl_trainer.data.prefix_tree import PackedRows
from agl_trainer.model.block_attention import ScoreOptions
from agl_trainer.model.compiled import compile_error
from agl_trainer.model.device import has_flex_attention

logger = logging.getLogger(__name__)

_HEAD_DIMS = (16, 32, 64, 128, 256)
"""Supported head dimensions. torch rejects smaller ones, its older versions any that is no power of two, and larger
ones exceed the shared memory of many GPUs."""
_MAX_VARIANTS = 64
"""Limit of compiled variants of the kernel (torch's default, 8, is too low): with or without gradients, with or without
a softcap, and specialized where lengths or numbers of blocks are one or equal."""

_BLOCK = 128
"""Queries, and keys, of a block of the mask."""
_BLOCKS_AT_ONCE = 64
"""Blocks of the mask whose pairs are in memory at once."""


def is_supported(query: Tensor) -> bool:
    """Whether the compiled kernel can compute attention of `query` [..., D] and its gradient on its device."""
    is_possible = has_flex_attention(query.device) and query.shape[-1] in _HEAD_DIMS
    return is_possible and can_compile(query.device.type)


@functools.cache
def can_compile(device: str) -> bool:
    """Whether torch can compile the kernel for this device type; logs a warning with the reason if not."""
    if reason := compile_error(device):
        logger.warning("%s: until that is installed, attention takes many small steps in the place of one", reason)
    return reason is None


def tree_mask(rows: PackedRows, start: int, window: int | None) -> BlockMask:
    """Mask [M, N]: which of N keys the queries of the last M tokens (from index `start` on) see, within `window`.

    It has one entry per block of 128 x 128 pairs. Pairs are compared only in blocks that their bounds do not decide.
    """
    count = len(rows.positions)
    subtree_ends = torch.cat([torch.full((part.end - part.start,), part.subtree_end) for part in rows.segments])
    # Padded to whole blocks: a padded query is after every subtree, and the subtree of a padded key is empty.
    ends, positions = _fill_block(subtree_ends.to(rows.positions.device)), _fill_block(rows.positions)
    first = _fill_block(rows.positions[start:] - (window or count) + 1)
    # A tensor: torch would compile the mask anew for every value of a captured number.
    offset = positions.new_full((), start)

    def sees(_batch: Tensor | None, _head: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
        index = query + offset
        return (key <= index) & (index < ends[key]) & (first[query] <= positions[key])

    of_queries = [_bounds(values)[:, :, None] for values in (torch.arange(len(first)).to(first) + start, first)]
    of_keys = [_bounds(values)[:, None] for values in (torch.arange(len(ends)).to(ends), ends, positions)]
    (low_index, high_index), (low_first, high_first) = of_queries
    (low_key, high_key), (low_end, high_end), (low_position, high_position) = of_keys
    full = (high_key <= low_index) & (high_index < low_end) & (high_first <= low_position)
    partial = (low_key <= high_index) & (low_index < high_end) & (low_first <= high_position) & ~full
    _unset_empty(partial, lambda queries, keys: sees(None, None, queries, keys))
    return BlockMask.from_kv_blocks(
        *_ordered(partial), *_ordered(full), BLOCK_SIZE=_BLOCK, mask_mod=sees, seq_lengths=(count - start, count)
    )


def _fill_block(values: Tensor) -> Tensor:
    """`values` [N], with zeros up to a multiple of the block size."""
    return pad(values, (0, -len(values) % _BLOCK))


def _bounds(values: Tensor) -> Tensor:
    """Lowest and highest of the `values` [N] in each block: [2, N / 128]."""
    return torch.stack(values.view(-1, _BLOCK).aminmax(dim=1))


def _unset_empty(blocks: Tensor, sees: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Clear the `blocks` [Q, K] in which no query sees a key; only pairs in blocks that are set are compared."""
    inside = torch.arange(_BLOCK, device=blocks.device)
    for some in blocks.nonzero().split(_BLOCKS_AT_ONCE):
        query, key = (some[:, axis, None] * _BLOCK + inside for axis in (0, 1))
        blocks[some[:, 0], some[:, 1]] = sees(query[:, :, None], key[:, None]).flatten(1).any(1)


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """FlexAttention's lists of the `blocks` [Q, K] that are set, for one head: their number in each row, and the
    columns, those that are set first."""
    columns = blocks.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], columns.to(torch.int32)[None, None]


def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, options: ScoreOptions) -> Tensor:
    """Output [Hkv, G, M, D] for query [Hkv, G, M, D], key and value [Hkv, N, D]; differentiable.

    On a CPU, in tests, it runs uncompiled and materializes all scores; torch supports no gradients there.
    """
    kernel = compiled_kernel() if has_flex_attention(query.device) else flex_attention
    cap = None if options.softcap is None else _softcap(query.new_full((), options.softcap))
    with compiler.patch(recompile_limit=_MAX_VARIANTS):
        # Key heads as the batch dimension with one head each: neither queries nor keys have to be copied.
        return kernel(query, key[:, None], value[:, None], cap, block_mask=mask, scale=options.scale, enable_gqa=True)


@functools.cache
def compiled_kernel() -> Callable[..., Tensor]:
    # fullgraph: an error instead of an uncompiled fallback, which would materialize all scores.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def _softcap(cap: Tensor) -> Callable[..., Tensor]:
    """Score function of FlexAttention. `cap` is a tensor: with dynamic shapes torch compiles no captured float."""

    def capped(score: Tensor, _batch: Tensor, _head: Tensor, _query: Tensor, _key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped
