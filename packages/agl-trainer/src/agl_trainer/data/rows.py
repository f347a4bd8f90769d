"""Training rows: token sequences with the tokens to train on, and their logprobs under a policy."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from agl_trainer.data.truncation import Truncation


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """A token sequence with a loss mask: 1 for the tokens to train on."""

    token_ids: Sequence[int]
    loss_mask: Sequence[int]
    weight: float
    """Factor on the loss of each trained token."""
    temperatures: Sequence[float] | None = field(default=None, kw_only=True)
    """Divisor of the logits of each token. None: 1 for all."""
    truncation: Truncation = field(default=Truncation(), kw_only=True)
    """Limits of the distribution that the trained tokens were sampled from."""
    calls: Mapping[str, range] = field(default_factory=dict, kw_only=True)
    """Span id of each model call that trains to the positions of its tokens, which all have mask 1."""

    @property
    def key(self) -> Hashable:
        """Equal for rows with the same logprobs under the same policy."""
        return tuple(self.token_ids), tuple(self.loss_mask), tuple(self.temperatures or ()), self.truncation

    def trained(self, values: Sequence[float]) -> list[float]:
        """`values` of the tokens with mask 1."""
        return [value for value, counts in zip(values, self.loss_mask, strict=True) if counts]


@dataclass(frozen=True, slots=True)
class SampledRow(TrainingRow):
    """A row that a policy sampled. Lists are as long as `token_ids`; values at mask 0 are ignored."""

    logprobs: Sequence[float]
    """Recorded by the engine while sampling; NaN: not those of the distribution that it sampled from."""
    advantages: Sequence[float]
    minibatch: int = 0
    """Index of its optimizer step within the training step."""


Row = TypeVar("Row", bound=TrainingRow)


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """Values of the trained tokens of B rows, padded to [B, T]."""

    logprobs: Tensor
    """[B, T] float32 (float64 for a float64 model), padded with 0; with gradient."""
    entropies: Tensor
    """[B, T] entropy of the distribution at each token, in nats; with gradient only if requested."""
    mask: Tensor
    """[B, T] bool: False where padded."""
    distinct_tokens: int
    """Tokens that were computed."""
