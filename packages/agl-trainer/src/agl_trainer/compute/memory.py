"""How many tokens a pass may hold before memory runs out, found by running out of it."""

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from agl.errors import TrainingError
from agl_trainer.data.cut import Part, cut, padded_passes
from agl_trainer.data.rows import Row
from agl_trainer.model.policy import Policy

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
_CPU_ALLOCATOR = "DefaultCPUAllocator"
"""Stands in every error of torch's allocator for CPUs, which has no type of its own."""


def within_memory(
    policy: Policy, rows: Sequence[Row], pack_tokens: int, attempt: "Callable[[Sequence[Part[Row]]], Result]"
) -> Result:
    """What `attempt` returns for `rows` cut into passes of at most `pack_tokens`.

    Out of memory it is called again with passes half as large, and so is whatever comes after: no result depends on how
    rows are cut. Raises TrainingError where the longest row alone is too long.
    """
    longest = max((len(row.token_ids) for row in rows), default=0)
    while True:
        tokens = min(pack_tokens, policy.pack_limit or pack_tokens)
        try:
            return attempt(cut(rows, tokens) if policy.packs else padded_passes(rows, tokens))
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            if policy.is_sharded:
                raise TrainingError(
                    f"out of memory with passes of {tokens} tokens ({error}); the other devices wait in the middle of "
                    "theirs, so lower train.pack_tokens and start again: the training goes on from its last checkpoint"
                ) from error
            if tokens <= longest:
                raise TrainingError(
                    f"out of memory with a pass of one row of {longest} tokens ({error}); lower engine.max_model_len "
                    "or train.max_tokens, or take a smaller model"
                ) from error
        # Not within the handler: its traceback holds the tensors of the pass that failed.
        policy.pack_limit = max(tokens // 2, longest)
        logger.warning(
            "out of memory with passes of %d tokens; going on with %d (train.pack_tokens is %d)",
            tokens,
            policy.pack_limit,
            pack_tokens,
        )


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or _CPU_ALLOCATOR in str(error)
