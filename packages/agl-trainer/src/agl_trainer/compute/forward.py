"""Logprobs and entropies of rows under the current weights, without gradient."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic

import torch
from torch import Tensor

from agl_trainer.compute.devices import device_count, run_on_all
from agl_trainer.compute.logprobs import row_logprobs
from agl_trainer.compute.memory import within_memory
from agl_trainer.compute.prefix import ComputedPrefix, PassRunner
from agl_trainer.data.passes import PassNode, split_rows
from agl_trainer.data.rows import Row
from agl_trainer.model.policy import Policy


@dataclass(frozen=True, slots=True)
class RowValues:
    """Values [T] of the trained tokens of each row, on the CPU, by the row's key."""

    logprobs: dict[Hashable, Tensor] = field(default_factory=dict)
    entropies: dict[Hashable, Tensor] = field(default_factory=dict)


def forward_rows(policy: Policy, role: str, rows: Sequence[Row], pack_tokens: int | None) -> RowValues:
    """Values of `rows` under `role`, a role or the base model; every device computes its share of the rows."""
    job: _ForwardJob[Any] = _ForwardJob(role, rows, pack_tokens)
    found = RowValues()
    for values in run_on_all(policy, [replace(job, rows=share) for share in split_rows(rows, device_count())]):
        found.logprobs.update(values.logprobs)
        found.entropies.update(values.entropies)
    return found


@dataclass(frozen=True, slots=True)
class _ForwardJob(Generic[Row]):
    role: str
    rows: Sequence[Row]
    pack_tokens: int | None

    @torch.no_grad()
    def run(self, policy: Policy) -> RowValues:
        def attempt(nodes: "Sequence[PassNode[Row]]") -> RowValues:
            found = RowValues()

            def run(rows: list[Row], prefix: ComputedPrefix | None) -> None:
                result = row_logprobs(policy, self.role, rows, prefix=prefix)
                for row, *values, mask in zip(rows, result.logprobs, result.entropies, result.mask, strict=True):
                    found.logprobs[row.key], found.entropies[row.key] = (of_row[mask].cpu() for of_row in values)

            PassRunner(policy, self.role, run).run_all(nodes)
            return found

        return within_memory(policy, self.rows, self.pack_tokens, attempt)
