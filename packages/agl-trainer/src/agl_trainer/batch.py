"""Training rows and their division into passes that fit the memory."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """A sequence, the tokens of it that train (mask 1), and the weight of their losses."""

    token_ids: Sequence[int]
    loss_mask: Sequence[int]
    weight: float
    """Factor on the loss of each trained token."""
    temperatures: Sequence[float] | None = field(default=None, kw_only=True)
    """Of each token: what logits are divided by. None: 1 everywhere."""

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


def passes(rows: Iterable[Row], pack_tokens: int) -> Iterator[list[Row]]:
    """`rows` in passes of at most `pack_tokens` distinct tokens each, at least one row in each.

    Sorted by their tokens, rows that share a prefix are neighbours, so a row adds what it does not share with the
    row before it.
    """
    taken: list[Row] = []
    distinct = 0
    for row in sorted(rows, key=lambda row: list(row.token_ids)):
        added = len(row.token_ids) - (_shared(taken[-1].token_ids, row.token_ids) if taken else 0)
        if taken and distinct + added > pack_tokens:
            yield taken
            taken, distinct, added = [], 0, len(row.token_ids)
        taken.append(row)
        distinct += added
    if taken:
        yield taken


def _shared(left: Sequence[int], right: Sequence[int]) -> int:
    longest = min(len(left), len(right))
    return next((place for place in range(longest) if left[place] != right[place]), longest)
