"""Attention over a trie of tokens on a GPU: FlexAttention (arXiv 2412.05496), one kernel with a mask of blocks.

A query sees the keys of its own row up to itself: those no later in the packed order whose segment's subtree holds it.
"""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor
from torch._dynamo import config as compiler
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from agl_trainer.data.prefix_tree import PackedRows
from agl_trainer.model.attention_parts import Scores
from agl_trainer.model.compiled import refusal

logger = logging.getLogger(__name__)

_WIDTHS = (16, 32, 64, 128, 256)
"""Of heads. torch refuses narrower ones, older versions of it all but powers of two, and wider ones outgrow the shared
memory of many GPUs."""
_VARIANTS = 64
"""How often torch may compile the kernel: with a gradient or without, with a cap or without, and again where lengths or
numbers of blocks happen to be one, or equal. Its own limit of 8 is soon reached."""


def takes(query: Tensor) -> bool:
    """Whether the compiled kernel computes attention of `query` [..., D], and its gradient, where it is."""
    return query.is_cuda and query.shape[-1] in _WIDTHS and is_compiled(query.device.type)


@functools.cache
def is_compiled(device: str) -> bool:
    """Whether torch can compile the kernel for devices of this type; where it lacks something, a warning says so."""
    why = refusal(device)
    if why:
        logger.warning("%s: until that is installed, attention takes many small steps in the place of one", why)
    return why is None


def tree_mask(rows: PackedRows, start: int, window: int | None) -> BlockMask:
    """Which of N keys the last M of N tokens see, those from place `start` on, and less than `window` positions away.

    M x N booleans are held while it is made; it keeps one entry for each 128 x 128 of them.
    """
    positions, count = rows.positions, len(rows.positions)
    ends = torch.cat([torch.full((part.end - part.start,), part.subtree_end) for part in rows.segments])
    ends = ends.to(positions.device)
    first = positions[start:] - (window or count) + 1
    # Tensors only: a captured number would be compiled anew for each of its values.
    offset = positions.new_full((), start)

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        place = query + offset
        return (key <= place) & (place < ends[key]) & (first[query] <= positions[key])

    return create_block_mask(sees, None, None, count - start, count, device=str(positions.device))


def attend_masked(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scores: Scores) -> Tensor:
    """Output [Hkv, G, M, D] for query [Hkv, G, M, D], key and value [Hkv, N, D]; differentiable.

    A CPU computes it too, for tests: uncompiled, from all scores at once. torch allows no gradients there by itself.
    """
    attend = compiled_attention() if query.is_cuda else flex_attention
    capped = None if scores.softcap is None else _capped(query.new_full((), scores.softcap))
    with compiler.patch(recompile_limit=_VARIANTS):
        # Key heads as a batch of one head each: neither the layout of the queries nor a key has to be copied.
        return attend(query, key[:, None], value[:, None], capped, block_mask=mask, scale=scores.scale, enable_gqa=True)


@functools.cache
def compiled_attention() -> Callable[..., Tensor]:
    # As a whole or not at all: uncompiled it would hold all scores, without a word.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def _capped(cap: Tensor) -> Callable[..., Tensor]:
    """`cap` is a tensor because torch compiles no captured float where lengths vary."""

    def capped(score: Tensor, _batch: Tensor, _head: Tensor, _query: Tensor, _key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped
