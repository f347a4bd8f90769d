"""Finds how many tokens a pass may have by running out of memory and retrying with smaller passes."""

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from agl.errors import TrainingError
from agl_trainer.data.passes import PassNode, plan_padded_passes, plan_passes
from agl_trainer.data.rows import Row
from agl_trainer.model.policy import Policy

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
_CPU_ALLOCATOR = "DefaultCPUAllocator"
"""Part of every error message of torch's CPU allocator, which has no exception type of its own."""


def within_memory(
    policy: Policy, rows: Sequence[Row], pack_tokens: int, attempt: "Callable[[Sequence[PassNode[Row]]], Result]"
) -> Result:
    """The result of `attempt` on `rows`, split into passes of at most `pack_tokens` tokens.

    When memory runs out, `attempt` is called again with passes of half the size, which later calls keep. Results do not
    depend on the split. Raises TrainingError if the longest row alone does not fit.
    """
    longest = max((len(row.token_ids) for row in rows), default=0)
    while True:
        tokens = min(pack_tokens, policy.pack_limit or pack_tokens)
        try:
            return attempt(plan_passes(rows, tokens) if policy.packs else plan_padded_passes(rows, tokens))
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError | torch.OutOfMemoryError) and _CPU_ALLOCATOR not in str(error):
                raise
            if policy.is_sharded:
                raise TrainingError(
                    f"out of memory with passes of {tokens} tokens ({error}); the other devices wait in the middle of "
                    "their passes, so lower train.pack_tokens and start again: training resumes at its last checkpoint"
                ) from error
            if tokens <= longest:
                raise TrainingError(
                    f"out of memory with a pass of one row of {longest} tokens ({error}); lower engine.max_model_len "
                    "or train.max_tokens, or use a smaller model"
                ) from error
        # Outside of the handler: its traceback keeps the tensors of the failed pass alive.
        policy.pack_limit = max(tokens // 2, longest)
        logger.warning(
            "out of memory with passes of %d tokens; continuing with %d (train.pack_tokens is %d)",
            tokens,
            policy.pack_limit,
            pack_tokens,
        )
