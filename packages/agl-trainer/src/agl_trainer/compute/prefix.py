"""A shared prefix, computed once for several passes, whose gradient accumulates over all of them.

Each layer's keys and values of the prefix, and its last hidden states, are kept with their graph. The passes use
detached copies as leaves; the gradients of the leaves add up over the passes, then one backward pass goes through the
graph of the prefix.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Generic

import torch
from torch import Tensor

from agl_trainer.compute.devices import gather_objects
from agl_trainer.data.passes import PASS, PassNode, PassShape, SharedPrefix, shape_of, union_of
from agl_trainer.data.prefix_tree import pack_rows
from agl_trainer.data.rows import Row
from agl_trainer.model.attention import PackedPlan
from agl_trainer.model.policy import Policy


@dataclass(slots=True)
class ComputedPrefix:
    """The computed tokens [start, end) of a prefix; `parent` has the tokens before `start`."""

    start: int
    end: int
    parent: "ComputedPrefix | None"
    keys_and_values: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Layer to keys and values [Hkv, end - start, D]: leaves in the graphs of the passes."""
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    """[end - start, H], also a leaf."""
    _leaves: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Tensors of the prefix's own graph, each with its leaf."""

    def leaf(self, tensor: Tensor) -> Tensor:
        """A detached copy of `tensor` for the graphs of the passes."""
        leaf = tensor.detach().requires_grad_(tensor.requires_grad)
        self._leaves.append((tensor, leaf))
        return leaf

    def attended(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of all tokens [0, end), one pair per prefix."""
        return [*(self.parent.attended(layer) if self.parent else []), self.keys_and_values[layer]]

    def states(self) -> list[Tensor]:
        """Hidden states of all tokens [0, end), one tensor per prefix."""
        return [*(self.parent.states() if self.parent else []), self.hidden]

    def backward(self) -> None:
        """Propagate the accumulated gradients of the leaves to the weights and to the leaves of `parent`."""
        used = [(tensor, leaf.grad) for tensor, leaf in self._leaves if leaf.grad is not None]
        if used and self.hidden.grad is None:
            # FSDP gathers layers in backward order, so the backward pass must start at the last layer.
            used += [(tensor, torch.zeros_like(tensor)) for tensor, leaf in self._leaves if leaf is self.hidden]
        if used:
            torch.autograd.backward([tensor for tensor, _ in used], [grad for _, grad in used])


@dataclass(frozen=True, slots=True)
class PassRunner(Generic[Row]):
    """Runs the passes of a step. With sharded layers all devices run the same number of passes in the same order."""

    policy: Policy
    role: str
    run: Callable[[list[Row], ComputedPrefix | None], None]
    """Called with the rows of each pass and their shared prefix. Runs the backward pass, unless under `no_grad`."""

    def run_all(self, nodes: "Sequence[PassNode[Row]]") -> int:
        """Run the passes of `nodes`; returns the number of tokens of all shared prefixes."""
        own = shape_of(nodes)
        return self._run(nodes, union_of(gather_objects(own)) if self.policy.is_sharded else own, None)

    def _run(self, nodes: "Sequence[PassNode[Row]]", shape: PassShape, parent: ComputedPrefix | None) -> int:
        """`shape` covers `nodes` and the nodes of the other devices."""
        tokens = 0
        for node, inner in zip_longest(nodes, shape):
            if isinstance(node, SharedPrefix):
                prefix = self._compute_prefix(node, parent)
                tokens += node.end - node.start + self._run(node.children, inner, prefix)
                prefix.backward()
            elif inner == PASS:
                self._run_pass(node, parent)
            else:
                idle = self._idle_forward()
                tokens += self._run([] if node is None else [node], inner, parent)
                _zero_backward(idle)
        return tokens

    def _compute_prefix(self, node: "SharedPrefix[Row]", parent: ComputedPrefix | None) -> ComputedPrefix:
        packed = pack_rows([node.row.token_ids[: node.end]]).to(self.policy.device)
        prefix = ComputedPrefix(node.start, node.end, parent)
        new = slice(node.start, node.end)
        plan = PackedPlan(packed, parent, record=prefix.keys_and_values)
        hidden = self.policy.hidden_states(packed.token_ids[new], packed.positions[new], [self.role], plan)
        prefix.hidden = prefix.leaf(hidden)
        for layer, (key, value) in list(prefix.keys_and_values.items()):
            prefix.keys_and_values[layer] = prefix.leaf(key), prefix.leaf(value)
        return prefix

    def _run_pass(self, rows: "list[Row] | None", prefix: ComputedPrefix | None) -> None:
        if rows is not None:
            self.run(rows, prefix)
        computes = rows is not None and (prefix is None or any(len(row.token_ids) > prefix.end for row in rows))
        if self.policy.is_sharded and not computes:
            _zero_backward(self._idle_forward())

    def _idle_forward(self) -> Tensor:
        """Run one token through all layers, only to take part in the collective calls of the other devices."""
        token = pack_rows([[0]]).to(self.policy.device)
        if not self.policy.packs:
            return self.policy.padded_states(token.token_ids, [1], self.role)
        return self.policy.hidden_states(token.token_ids, token.positions, [self.role], PackedPlan(token))


def _zero_backward(hidden: Tensor) -> None:
    if hidden.requires_grad:
        hidden.backward(torch.zeros_like(hidden))
