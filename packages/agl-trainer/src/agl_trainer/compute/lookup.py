"""Logprobs and entropies of rows under an adapter as it is, without a gradient."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic

import torch
from torch import Tensor

from agl_trainer.compute.devices import count, run_everywhere
from agl_trainer.compute.logprobs import row_logprobs
from agl_trainer.compute.memory import within_memory
from agl_trainer.compute.trunk import Grown, Passes
from agl_trainer.data.cut import Part, shares
from agl_trainer.data.rows import Row
from agl_trainer.model.policy import Policy


@dataclass(frozen=True, slots=True)
class Values:
    """[T] of the trained tokens of each row, by its key."""

    logprobs: dict[Hashable, Tensor] = field(default_factory=dict)
    entropies: dict[Hashable, Tensor] = field(default_factory=dict)


def look_up(policy: Policy, role: str, rows: Sequence[Row], pack_tokens: int) -> Values:
    """Values of `rows` under `role`, which may be the base model, on the CPU; each device looks up its share."""
    job: _LookupJob[Any] = _LookupJob(role, rows, pack_tokens)
    found = Values()
    for values in run_everywhere(policy, [replace(job, rows=share) for share in shares(rows, count())]):
        found.logprobs.update(values.logprobs)
        found.entropies.update(values.entropies)
    return found


@dataclass(frozen=True, slots=True)
class _LookupJob(Generic[Row]):
    role: str
    rows: Sequence[Row]
    pack_tokens: int

    @torch.no_grad()
    def run(self, policy: Policy) -> Values:
        def attempt(parts: "Sequence[Part[Row]]") -> Values:
            found = Values()

            def run(part: list[Row], trunk: Grown | None) -> None:
                result = row_logprobs(policy, self.role, part, trunk=trunk)
                for row, *values, mask in zip(part, result.logprobs, result.entropies, result.mask, strict=True):
                    found.logprobs[row.key], found.entropies[row.key] = (of_row[mask].cpu() for of_row in values)

            Passes(policy, self.role, run).take(parts)
            return found

        return within_memory(policy, self.rows, self.pack_tokens, attempt)
