"""The gradient of a loss over rows, pass by pass, and what the passes say of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic

from torch import Tensor

from agl_trainer.compute.devices import count, run_everywhere
from agl_trainer.compute.logprobs import row_logprobs
from agl_trainer.compute.memory import within_memory
from agl_trainer.compute.trunk import Grown, Passes
from agl_trainer.data.cut import Part, shares
from agl_trainer.data.rows import Row, RowLogprobs
from agl_trainer.model.policy import Policy

PassLoss = Callable[[RowLogprobs, Sequence[Row]], tuple[Tensor, dict[str, float]]]
"""Loss of the rows of one pass, a sum over their weighted tokens, and statistics that are means over tokens."""


@dataclass(slots=True)
class Gathered:
    """What the passes of a step say."""

    loss: float = 0.0
    distinct: int = 0
    """Tokens that were computed."""
    stats: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    """Name to the value of each pass, and its trained tokens."""

    def add(self, result: RowLogprobs, loss: Tensor, stats: Mapping[str, float]) -> None:
        tokens = int(result.mask.sum())
        entropy = result.entropies.detach()[result.mask].mean().item()
        for name, value in (dict(stats) | {"entropy": entropy}).items():
            self.stats.setdefault(name, []).append((value, tokens))
        self.loss += loss.item()
        self.distinct += result.distinct_tokens

    def join(self, other: "Gathered") -> None:
        for name, values in other.stats.items():
            self.stats.setdefault(name, []).extend(values)
        self.loss += other.loss
        self.distinct += other.distinct


@dataclass(frozen=True, slots=True)
class _GradientJob(Generic[Row]):
    """Adds the gradient of the loss of `rows` to the parameters of `role`."""

    role: str
    rows: Sequence[Row]
    loss_of: PassLoss[Row]
    pack_tokens: int
    entropy_gradient: bool

    def run(self, policy: Policy) -> Gathered:
        def attempt(parts: "Sequence[Part[Row]]") -> Gathered:
            clear(policy, self.role)
            gathered = Gathered()

            def run(part: list[Row], trunk: Grown | None) -> None:
                result = row_logprobs(policy, self.role, part, trunk=trunk, entropy_gradient=self.entropy_gradient)
                loss, stats = self.loss_of(result, part)
                loss.backward()
                gathered.add(result, loss, stats)

            trunks = Passes(policy, self.role, run).take(parts)
            gathered.distinct += trunks
            return gathered

        return within_memory(policy, self.rows, self.pack_tokens, attempt)


def leave_gradient(
    policy: Policy,
    role: str,
    rows: Sequence[Row],
    loss_of: PassLoss[Row],
    *,
    pack_tokens: int,
    entropy_gradient: bool,
) -> Gathered:
    """Leave the gradient of the summed loss of `rows` in the parameters of `role`; each device takes its share."""
    job: _GradientJob[Any] = _GradientJob(role, rows, loss_of, pack_tokens, entropy_gradient)
    total = Gathered()
    for gathered in run_everywhere(policy, [replace(job, rows=share) for share in shares(rows, count())]):
        total.join(gathered)
    return total


def clear(policy: Policy, role: str) -> None:
    """Forget the gradient of `role`."""
    for parameter in policy.parameters(role):
        parameter.grad = None
