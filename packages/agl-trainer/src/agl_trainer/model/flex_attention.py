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
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from agl_trainer.data.prefix_tree import PackedRows
from agl_trainer.model.block_attention import ScoreOptions
from agl_trainer.model.compiled import compile_error

logger = logging.getLogger(__name__)

_HEAD_DIMS = (16, 32, 64, 128, 256)
"""Supported head dimensions. torch rejects smaller ones, its older versions any that is no power of two, and larger
ones exceed the shared memory of many GPUs."""
_MAX_VARIANTS = 64
"""Limit of compiled variants of the kernel (torch's default, 8, is too low): with or without gradients, with or without
a softcap, and specialized where lengths or numbers of blocks are one or equal."""


def is_supported(query: Tensor) -> bool:
    """Whether the compiled kernel can compute attention of `query` [..., D] and its gradient on its device."""
    return query.is_cuda and query.shape[-1] in _HEAD_DIMS and can_compile(query.device.type)


@functools.cache
def can_compile(device: str) -> bool:
    """Whether torch can compile the kernel for this device type; logs a warning with the reason if not."""
    if reason := compile_error(device):
        logger.warning("%s: until that is installed, attention takes many small steps in the place of one", reason)
    return reason is None


def tree_mask(rows: PackedRows, start: int, window: int | None) -> BlockMask:
    """Mask [M, N]: which of N keys the queries of the last M tokens (from index `start` on) see, within `window`.

    M x N booleans are allocated while it is built; it keeps one entry per block of 128 x 128.
    """
    positions, count = rows.positions, len(rows.positions)
    ends = torch.cat([torch.full((part.end - part.start,), part.subtree_end) for part in rows.segments])
    ends = ends.to(positions.device)
    first = positions[start:] - (window or count) + 1
    # A tensor: torch would compile the mask anew for every value of a captured number.
    offset = positions.new_full((), start)

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        index = query + offset
        return (key <= index) & (index < ends[key]) & (first[query] <= positions[key])

    return create_block_mask(sees, None, None, count - start, count, device=str(positions.device))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, options: ScoreOptions) -> Tensor:
    """Output [Hkv, G, M, D] for query [Hkv, G, M, D], key and value [Hkv, N, D]; differentiable.

    On a CPU, in tests, it runs uncompiled and materializes all scores; torch supports no gradients there.
    """
    kernel = compiled_kernel() if query.is_cuda else flex_attention
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
