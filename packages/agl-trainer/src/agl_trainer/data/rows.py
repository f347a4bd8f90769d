"""Training rows."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """A sequence, the tokens of it that train (mask 1), and the weight of their losses."""

    token_ids: Sequence[int]
    loss_mask: Sequence[int]
    weight: float
    """Factor on the loss of each trained token."""
    temperatures: Sequence[float] | None = field(default=None, kw_only=True)
    """Of each token: what logits are divided by. None: 1 everywhere."""

    @property
    def key(self) -> Hashable:
        """Equal for rows that have the same logprobs under the same policy."""
        return tuple(self.token_ids), tuple(self.loss_mask), tuple(self.temperatures or ())

    def trained(self, values: Sequence[float]) -> list[float]:
        """`values` of the tokens with mask 1."""
        return [value for value, counts in zip(values, self.loss_mask, strict=True) if counts]


@dataclass(frozen=True, slots=True)
class SampledRow(TrainingRow):
    """A row that a policy sampled. Lists are as long as `token_ids` and count where the mask is 1."""

    logprobs: Sequence[float]
    """As sampled."""
    advantages: Sequence[float]
    minibatch: int = 0
    """Number of the optimizer step that it belongs to, within its training step."""


Row = TypeVar("Row", bound=TrainingRow)


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """For each row given, the tokens with mask 1: a ragged batch padded to [B, T]."""

    logprobs: Tensor
    """[B, T] float32 (float64 for a float64 model), 0 where padded; carries the gradient."""
    entropies: Tensor
    """[B, T], in nats, of the whole distribution at each token; a gradient only where it was asked for."""
    mask: Tensor
    """[B, T] bool."""
    distinct_tokens: int
    """Tokens that were computed."""
