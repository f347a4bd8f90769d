"""Chooses how many tokens a pass may have: by the free memory, then by running out of it and retrying with less."""

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import psutil
import torch

from agl.errors import TrainingError
from agl_trainer.data.passes import PassNode, plan_padded_passes, plan_passes
from agl_trainer.data.rows import Row
from agl_trainer.model.policy import Policy

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
_MOST_TOKENS_CPU = 1536
"""On CPUs the time of a step depends little on the size of its passes, and its memory nearly in proportion."""
_MOST_TOKENS_ACCELERATOR = 8192
"""Accelerators need long passes: every operation costs the time of its launch."""
_FEWEST_TOKENS = 128
_OUT_OF_MEMORY = ("DefaultCPUAllocator", "out of memory")
"""Part of the message of allocators without an exception type of their own: torch's for CPUs, and MPS."""


def within_memory(
    policy: Policy, rows: Sequence[Row], pack_tokens: int | None, attempt: "Callable[[Sequence[PassNode[Row]]], Result]"
) -> Result:
    """The result of `attempt` on `rows`, split into passes of at most `pack_tokens` tokens (none: `fitting_tokens`).

    When memory runs out, `attempt` is called again with passes of half the size, which later calls keep. Results do not
    depend on the split. Raises TrainingError if the longest row alone does not fit.
    """
    longest = max((len(row.token_ids) for row in rows), default=0)
    if pack_tokens is None and policy.pack_limit is None:
        policy.pack_limit = fitting_tokens(policy.device.type, _free_bytes(policy.device), policy.token_bytes)
    while True:
        tokens = min(limit for limit in (pack_tokens, policy.pack_limit) if limit is not None)
        try:
            return attempt(plan_passes(rows, tokens) if policy.packs else plan_padded_passes(rows, tokens))
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not any(
                part in str(error) for part in _OUT_OF_MEMORY
            ):
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
            "out of memory with passes of %d tokens; continuing with %d (train.pack_tokens is %s)",
            tokens,
            policy.pack_limit,
            pack_tokens or "not set",
        )


def fitting_tokens(device_type: str, free_bytes: float, token_bytes: int) -> int:
    """Tokens per pass whose activations, of `token_bytes` each, take at most half of the free memory.

    The most that a device of this type needs, or that halved until it fits: a little more or less free memory then
    gives the same passes, and so the same rounding.
    """
    most = _MOST_TOKENS_CPU if device_type == "cpu" else _MOST_TOKENS_ACCELERATOR
    tokens = most
    while tokens > _FEWEST_TOKENS and tokens * token_bytes > free_bytes / 2:
        tokens //= 2
    if tokens < most:
        message = "%.1f GB of memory are free: passes have at most %d tokens, not %d (train.pack_tokens is not set)"
        logger.warning(message, free_bytes / 1e9, tokens, most)
    return tokens


def _free_bytes(device: torch.device) -> float:
    """Free memory of `device`; infinite for accelerators that do not report it, which only run out of it."""
    if device.type == "cpu":
        return psutil.virtual_memory().available
    report = getattr(torch.get_device_module(device), "mem_get_info", None)
    return report(device)[0] if report else float("inf")
