"""A prefix computed once for several passes, with its gradient gathered from all of them.

Each layer's keys and values of the prefix, and its last hidden states, are kept with their graph. The passes take them
as leaves; what flows back into the leaves adds up over the passes, and goes down the graph of the prefix once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from agl_trainer.attention import PackedPlan
from agl_trainer.batch import Row
from agl_trainer.cut import Part, Trunk
from agl_trainer.policy import Policy
from agl_trainer.tree import pack_rows


@dataclass(slots=True)
class Grown:
    """The tokens [start, end) of a prefix, computed; those before them are in the trunk `below`."""

    start: int
    end: int
    below: "Grown | None"
    keys_and_values: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Of each layer, [Hkv, end - start, D]: leaves of the graphs of the passes."""
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    """[end - start, H], a leaf too."""
    _ends: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """A tensor of the trunk's own graph, and its leaf."""

    def leaf(self, end: Tensor) -> Tensor:
        """What the passes take in the place of `end`."""
        leaf = end.detach().requires_grad_(end.requires_grad)
        self._ends.append((end, leaf))
        return leaf

    def attended(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of all tokens [0, end), in pieces."""
        before = self.below.attended(layer) if self.below else []
        return [*before, self.keys_and_values[layer]]

    def states(self) -> list[Tensor]:
        """Hidden states of all tokens [0, end), in pieces."""
        return [*(self.below.states() if self.below else []), self.hidden]

    def backward(self) -> None:
        """Take what the passes left in the leaves down to the weights, and to the leaves of the trunk below."""
        used = [(end, leaf.grad) for end, leaf in self._ends if leaf.grad is not None]
        if used:
            torch.autograd.backward([end for end, _ in used], [grad for _, grad in used])


def run_parts(
    policy: Policy,
    role: str,
    parts: "Sequence[Part[Row]]",
    run: Callable[[list[Row], Grown | None], None],
    below: Grown | None = None,
) -> int:
    """Call `run` with the rows of each pass and the trunk it stands on; returns how many tokens the trunks have.

    `run` takes its pass all the way back, or all of it runs under `torch.no_grad`.
    """
    tokens = 0
    for part in parts:
        if isinstance(part, Trunk):
            grown = _grow(policy, role, part, below)
            tokens += part.end - part.start + run_parts(policy, role, part.parts, run, grown)
            grown.backward()
        else:
            run(part, below)
    return tokens


def _grow(policy: Policy, role: str, part: "Trunk[Row]", below: Grown | None) -> Grown:
    packed = pack_rows([part.row.token_ids[: part.end]]).to(policy.device)
    grown = Grown(part.start, part.end, below)
    new = slice(part.start, part.end)
    hidden = policy.hidden_states(
        packed.token_ids[new], packed.positions[new], [role], PackedPlan(packed, below, record=grown.keys_and_values)
    )
    grown.hidden = grown.leaf(hidden)
    for layer, (key, value) in list(grown.keys_and_values.items()):
        grown.keys_and_values[layer] = grown.leaf(key), grown.leaf(value)
    return grown
