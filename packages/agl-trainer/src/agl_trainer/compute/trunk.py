"""A prefix computed once for several passes, with its gradient gathered from all of them.

Each layer's keys and values of the prefix, and its last hidden states, are kept with their graph. The passes take them
as leaves; what flows back into the leaves adds up over the passes, and goes down the graph of the prefix once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Generic

import torch
from torch import Tensor

from agl_trainer.compute.devices import everyones
from agl_trainer.data.cut import PASS, Part, Shape, Trunk, joined, shape
from agl_trainer.data.rows import Row
from agl_trainer.data.trie import pack_rows
from agl_trainer.model.attention import PackedPlan
from agl_trainer.model.policy import Policy


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
        if used and self.hidden.grad is None:
            # Layers are gathered in the order in which gradients leave them: from the end of the last one on.
            used += [(end, torch.zeros_like(end)) for end, leaf in self._ends if leaf is self.hidden]
        if used:
            torch.autograd.backward([end for end, _ in used], [grad for _, grad in used])


@dataclass(frozen=True, slots=True)
class Passes(Generic[Row]):
    """The passes of a step, in the order and number in which all devices take them where layers are sharded."""

    policy: Policy
    role: str
    run: Callable[[list[Row], Grown | None], None]
    """Called with the rows of each pass and the trunk it stands on; takes the pass all the way back, or all of them run
    under `torch.no_grad`."""

    def take(self, parts: "Sequence[Part[Row]]") -> int:
        """Run `parts`; returns how many tokens their trunks have."""
        own = shape(parts)
        return self._take(parts, joined(everyones(own)) if self.policy.is_sharded else own, None)

    def _take(self, parts: "Sequence[Part[Row]]", wanted: Shape, below: Grown | None) -> int:
        """`wanted` has a place for each of `parts`, and those of other devices."""
        tokens = 0
        for part, inner in zip_longest(parts, wanted):
            if isinstance(part, Trunk):
                grown = _grow(self.policy, self.role, part, below)
                tokens += part.end - part.start + self._take(part.parts, inner, grown)
                grown.backward()
            elif inner == PASS:
                self._pass(part, below)
            else:
                idle = self._idle()
                tokens += self._take([] if part is None else [part], inner, below)
                _back(idle)
        return tokens

    def _pass(self, rows: "list[Row] | None", below: Grown | None) -> None:
        if rows is not None:
            self.run(rows, below)
        computes = rows is not None and (below is None or any(len(row.token_ids) > below.end for row in rows))
        if self.policy.is_sharded and not computes:
            _back(self._idle())

    def _idle(self) -> Tensor:
        """Go through all layers with one token, of which nothing is learnt, because other devices do."""
        token = pack_rows([[0]]).to(self.policy.device)
        if not self.policy.packs:
            return self.policy.padded_states(token.token_ids, [1], self.role)
        return self.policy.hidden_states(token.token_ids, token.positions, [self.role], PackedPlan(token))


def _back(hidden: Tensor) -> None:
    if hidden.requires_grad:
        hidden.backward(torch.zeros_like(hidden))


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
