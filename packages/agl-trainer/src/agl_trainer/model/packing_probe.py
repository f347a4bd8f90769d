"""Probes whether a model supports rows packed as a prefix tree."""

import logging

import torch
from transformers import PreTrainedModel

from agl_trainer.data.prefix_tree import pack_rows
from agl_trainer.model.attention import NAME, PackedPlan

logger = logging.getLogger(__name__)

_ROWS = [[1, 2, 3, 4, 6], [1, 2, 5, 6], [1, 2, 3, 5]]
_TOLERANCE = 0.05
"""Relative distance of hidden states. Rounding in bfloat16 stays well below it, attending to wrong tokens far above."""


@torch.no_grad()
def supports_packing(model: PreTrainedModel) -> bool:
    """Whether packed rows get the hidden states that `model` computes for each row alone, up to rounding.

    They do not if a layer mixes tokens by other means than attention (Mamba), if attention uses more than queries, keys
    and a window (sinks, ALiBi), or if it cannot be replaced; a warning gives the reason. Leaves `model` unchanged.
    """
    body, own_attention = model.get_decoder(), model.config._attn_implementation or "eager"
    rows = [torch.tensor(row, device=model.device) for row in _ROWS]
    expected = [body(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in rows]
    model.set_attn_implementation(NAME)
    try:
        if model.config._attn_implementation != NAME:
            return _warn(model, "its attention cannot be replaced")
        packed = pack_rows(_ROWS).to(model.device)
        inputs = {"input_ids": packed.token_ids[None], "position_ids": packed.positions[None]}
        found = body(**inputs, use_cache=False, plan=PackedPlan(packed)).last_hidden_state[0]
    except (TypeError, ValueError, AttributeError) as error:
        return _warn(model, f"it does not run with another attention ({error})")
    finally:
        model.set_attn_implementation(own_attention)
    distance = max(
        float((found[index.to(found.device)] - row).norm() / row.norm())
        for index, row in zip(packed.row_index, expected, strict=True)
    )
    return distance < _TOLERANCE or _warn(model, f"packed, its hidden states are off by {distance:.2g} of their size")


def _warn(model: PreTrainedModel, reason: str) -> bool:
    logger.warning(
        "rows of a %s model are padded instead of packed, so that shared tokens are computed again: %s",
        model.config.model_type,
        reason,
    )
    return False
