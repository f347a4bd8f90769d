"""The loss of supervised fine-tuning."""

from collections.abc import Sequence

from torch import Tensor

from agl_trainer.data.rows import RowLogprobs, TrainingRow


def sft_loss(result: RowLogprobs, rows: Sequence[TrainingRow]) -> tuple[Tensor, dict[str, float]]:
    """Negative log-likelihood of the trained tokens, weighted by row; no statistics."""
    weights = result.logprobs.new_tensor([row.weight for row in rows])[:, None]
    return -(result.logprobs * weights).sum(), {}
