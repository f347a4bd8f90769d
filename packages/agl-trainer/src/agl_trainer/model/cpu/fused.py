"""The forward pass for sampling of decoders of Llama's kind: what transformers computes, in a third of the calls.

With one token for each of a few sequences, a layer costs what it takes to read its weights and to make its calls.
Queries, keys and values are one product here, and so are the two halves of a gated MLP. There are no gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from agl_trainer.model.attention import AttentionPlan
from agl_trainer.model.attention_parts import Scores
from agl_trainer.model.cpu.products import FrozenProduct, PackedProduct, has_packed_kernel
from agl_trainer.model.lora import Routed

_DECODERS: Final = {"LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"}
"""Those of transformers whose layers are norm, attention with rotary positions, norm, gated MLP."""


def can_be_fused(decoder: torch.nn.Module) -> bool:
    """Whether `FusedDecoder` computes what `decoder` does."""
    kind = type(decoder)
    known = kind.__name__ in _DECODERS and kind.__module__.startswith("transformers.")
    return known and all(has_packed_kernel(weight) for weight in decoder.parameters())


class FusedDecoder:
    """A decoder that `can_be_fused`. The weights of its layers lie in memory a second time once this is made."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self._layers = [_Layer(layer) for layer in decoder.layers]
        self._norm = _norm(decoder.norm)

    def __call__(self, tokens: Tensor, positions: Tensor, plan: AttentionPlan) -> Tensor:
        """Final hidden states [N, H] for N tokens at `positions`."""
        hidden: Tensor = self._decoder.embed_tokens(tokens)
        cos, sin = (turn[0, :, None] for turn in self._decoder.rotary_emb(hidden[None], positions[None]))
        half = cos.shape[-1] // 2  # the other half is the same
        rotate = _Rotation(cos[..., :half].contiguous(), sin[..., :half].contiguous())
        for number, layer in enumerate(self._layers):
            hidden = layer(number, hidden, rotate, plan)
        return self._norm(hidden)


@dataclass(frozen=True, slots=True)
class _Rotation:
    """Rotary positions (RoFormer, arXiv 2104.09864) of N tokens: cosine and sine [N, 1, D/2]."""

    cos: Tensor
    sin: Tensor

    def __call__(self, heads: Tensor) -> Tensor:
        """[N, heads, D], of which place i and place i + D/2 are a pair."""
        turned = torch.empty(heads.shape, dtype=heads.dtype)
        (one, other), (new_one, new_other) = heads.chunk(2, -1), turned.chunk(2, -1)
        torch.mul(one, self.cos, out=new_one).addcmul_(other, self.sin, value=-1)
        torch.mul(other, self.cos, out=new_other).addcmul_(one, self.sin)
        return turned


class _Layer:
    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._width: int = attention.head_dim
        self._scores = Scores(attention.scaling)
        self._before_attention, self._before_mlp = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
        self._ask = _Product(attention.q_proj, attention.k_proj, attention.v_proj)
        self._tell = _Product(attention.o_proj)
        self._up, self._down = _Product(mlp.gate_proj, mlp.up_proj), _Product(mlp.down_proj)
        self._activate = mlp.act_fn
        keys: int = attention.k_proj.out_features // self._width
        self._heads = (keys, attention.q_proj.out_features // self._width // keys)
        self._norm_heads = _norm_of_heads(attention, *self._heads)

    def __call__(self, number: int, hidden: Tensor, rotate: _Rotation, plan: AttentionPlan) -> Tensor:
        hidden = self._attend(number, self._before_attention(hidden), rotate, plan).add_(hidden)
        gate, up = self._up(self._before_mlp(hidden)).chunk(2, -1)
        return self._down(self._activate(gate).mul_(up)).add_(hidden)

    def _attend(self, number: int, x: Tensor, rotate: _Rotation, plan: AttentionPlan) -> Tensor:
        keys, groups = self._heads
        made = self._ask(x).view(len(x), -1, self._width)
        turned = rotate(self._norm_heads(made[:, :-keys]))
        query = turned[:, :-keys].view(len(x), keys, groups, self._width)
        out = plan.attend(
            number,
            query.transpose(0, 1),
            turned[:, -keys:].transpose(0, 1),
            made[:, -keys:].transpose(0, 1),
            self._scores,
        )
        return self._tell(out.transpose(0, 1).reshape(len(x), -1))


class _Product:
    """Linear layers that take the same input, as one."""

    def __init__(self, *layers: Any) -> None:
        self._parts = [_routed(layer) for layer in layers]
        self._product = PackedProduct([layer.weight for layer in layers], [layer.bias for layer in layers])
        self._sizes = [len(layer.weight) for layer in layers]

    def __call__(self, x: Tensor) -> Tensor:
        """[N, out of all] for `x` [N, in]."""
        out = self._product(x)
        for part, own in zip(self._parts, out.split(self._sizes, -1), strict=True):
            part.add_deltas(own, x)
        return out


def _routed(layer: Any) -> Routed:
    """A linear layer with what adapters add to it, which is nothing where it has none."""
    owner = layer.forward.__self__
    return owner if isinstance(owner, Routed) else Routed(FrozenProduct(layer))


def _norm(norm: Any) -> Callable[[Tensor], Tensor]:
    """Root mean square norm (arXiv 1910.07467) of [N, H]."""
    shape, weight, eps = norm.weight.shape, norm.weight, _epsilon(norm)
    return lambda x: torch.nn.functional.rms_norm(x, shape, weight, eps)


def _norm_of_heads(attention: Any, keys: int, groups: int) -> Callable[[Tensor], Tensor]:
    """What Qwen3 does with the heads [N, heads, D] of queries and keys before it turns them; others do nothing."""
    if not hasattr(attention, "q_norm"):
        return lambda heads: heads
    query, key = attention.q_norm, attention.k_norm
    weight = torch.cat([query.weight.expand(keys * groups, -1), key.weight.expand(keys, -1)])
    eps = _epsilon(query)
    return lambda heads: torch.nn.functional.rms_norm(heads, weight.shape[1:], eps=eps).mul_(weight)


def _epsilon(norm: Any) -> float:
    """Transformers' norms have their own name for what torch calls `eps`."""
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
