"""The gradient of a loss over rows, accumulated over passes and devices, with the statistics of the passes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic

from torch import Tensor

from agl_trainer.compute.devices import device_count, run_on_all
from agl_trainer.compute.logprobs import row_logprobs
from agl_trainer.compute.memory import within_memory
from agl_trainer.compute.prefix import ComputedPrefix, PassRunner
from agl_trainer.data.passes import PassNode, split_rows
from agl_trainer.data.rows import Row, RowLogprobs, TrainingRow
from agl_trainer.model.policy import Policy

PassLoss = Callable[[RowLogprobs, Sequence[Row]], tuple[Tensor, dict[str, float]]]
"""Loss of the rows of one pass, summed over their weighted tokens, and statistics as means over tokens."""


@dataclass(slots=True)
class PassSums:
    """Sums over the passes of an optimizer step."""

    loss: float = 0.0
    distinct_tokens: int = 0
    """Tokens that were computed."""
    stats: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    """Name to the value of each pass and the pass's number of trained tokens."""
    logprobs: dict[tuple[str, ...], Tensor] = field(default_factory=dict)
    """The calls of each row that has any, to the logprobs [T] of its trained tokens, on the CPU."""

    def add(self, rows: Sequence[TrainingRow], result: RowLogprobs, loss: Tensor, stats: Mapping[str, float]) -> None:
        tokens = int(result.mask.sum())
        entropy = result.entropies.detach()[result.mask].mean().item()
        for name, value in (dict(stats) | {"entropy": entropy}).items():
            self.stats.setdefault(name, []).append((value, tokens))
        self.loss += loss.item()
        self.distinct_tokens += result.distinct_tokens
        if any(row.calls for row in rows):
            of_rows = zip(rows, result.logprobs.detach().cpu(), result.mask.cpu(), strict=True)
            self.logprobs |= {tuple(row.calls): values[mask] for row, values, mask in of_rows if row.calls}

    def merge(self, other: "PassSums") -> None:
        for name, values in other.stats.items():
            self.stats.setdefault(name, []).extend(values)
        self.logprobs |= other.logprobs
        self.loss += other.loss
        self.distinct_tokens += other.distinct_tokens


@dataclass(frozen=True, slots=True)
class _GradientJob(Generic[Row]):
    """Adds the gradient of the loss of `rows` to the parameters of `role`."""

    role: str
    rows: Sequence[Row]
    loss_fn: PassLoss[Row]
    pack_tokens: int | None
    entropy_gradient: bool

    def run(self, policy: Policy) -> PassSums:
        def attempt(nodes: "Sequence[PassNode[Row]]") -> PassSums:
            clear_gradient(policy, self.role)
            sums = PassSums()

            def run(rows: list[Row], prefix: ComputedPrefix | None) -> None:
                result = row_logprobs(policy, self.role, rows, prefix=prefix, entropy_gradient=self.entropy_gradient)
                loss, stats = self.loss_fn(result, rows)
                loss.backward()
                sums.add(rows, result, loss, stats)

            prefix_tokens = PassRunner(policy, self.role, run).run_all(nodes)
            sums.distinct_tokens += prefix_tokens
            return sums

        return within_memory(policy, self.rows, self.pack_tokens, attempt)


def accumulate_gradient(
    policy: Policy,
    role: str,
    rows: Sequence[Row],
    loss_fn: PassLoss[Row],
    *,
    pack_tokens: int | None,
    entropy_gradient: bool,
) -> PassSums:
    """Set the gradient of `role` to that of the summed loss of `rows`; every device computes its share of the rows."""
    job: _GradientJob[Any] = _GradientJob(role, rows, loss_fn, pack_tokens, entropy_gradient)
    total = PassSums()
    for sums in run_on_all(policy, [replace(job, rows=share) for share in split_rows(rows, device_count())]):
        total.merge(sums)
    return total


def clear_gradient(policy: Policy, role: str) -> None:
    for parameter in policy.parameters(role):
        parameter.grad = None
