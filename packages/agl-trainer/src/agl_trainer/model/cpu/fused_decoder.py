"""Fused forward pass for sampling from Llama-like decoders: the computation of transformers in a third of the calls.

With one token for each of a few sequences, the time of a layer is that of reading its weights and dispatching its
operations. Here the query, key and value projections are one product, and so are the gate and up projections of the
MLP. No gradients are computed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from agl_trainer.model.attention import AttentionPlan
from agl_trainer.model.block_attention import ScoreOptions
from agl_trainer.model.cpu.frozen_linear import FrozenLinear, PackedLinear, can_be_packed
from agl_trainer.model.lora import LoraLinear

_DECODERS: Final = {"LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"}
"""Decoders of transformers whose layers are norm, attention with rotary embeddings, norm, gated MLP."""


def can_be_fused(decoder: torch.nn.Module) -> bool:
    """Whether `FusedDecoder` supports `decoder`."""
    kind = type(decoder)
    known = kind.__name__ in _DECODERS and kind.__module__.startswith("transformers.")
    return known and all(can_be_packed(weight) for weight in decoder.parameters())


class FusedDecoder:
    """A decoder that `can_be_fused`. Holds a second copy of the weights of its layers."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self._layers = [_Layer(layer) for layer in decoder.layers]
        self._norm = _norm(decoder.norm)

    def __call__(self, tokens: Tensor, positions: Tensor, plan: AttentionPlan) -> Tensor:
        """Final hidden states [N, H] for N tokens at `positions`."""
        hidden: Tensor = self._decoder.embed_tokens(tokens)
        cos, sin = (table[0, :, None] for table in self._decoder.rotary_emb(hidden[None], positions[None]))
        half = cos.shape[-1] // 2  # the second half repeats the first
        rotate = _Rotation(cos[..., :half].contiguous(), sin[..., :half].contiguous())
        for number, layer in enumerate(self._layers):
            hidden = layer(number, hidden, rotate, plan)
        return self._norm(hidden)


@dataclass(frozen=True, slots=True)
class _Rotation:
    """Rotary position embedding (RoFormer, arXiv 2104.09864) of N tokens: cosine and sine [N, 1, D/2]."""

    cos: Tensor
    sin: Tensor

    def __call__(self, heads: Tensor) -> Tensor:
        """Rotate [N, heads, D]; components i and i + D/2 form a pair."""
        rotated = torch.empty(heads.shape, dtype=heads.dtype)
        (first, second), (new_first, new_second) = heads.chunk(2, -1), rotated.chunk(2, -1)
        torch.mul(first, self.cos, out=new_first).addcmul_(second, self.sin, value=-1)
        torch.mul(second, self.cos, out=new_second).addcmul_(first, self.sin)
        return rotated


class _Layer:
    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._head_dim: int = attention.head_dim
        self._scores = ScoreOptions(attention.scaling)
        self._attention_norm, self._mlp_norm = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
        self._qkv = _FusedLinear(attention.q_proj, attention.k_proj, attention.v_proj)
        self._output = _FusedLinear(attention.o_proj)
        self._gate_up, self._down = _FusedLinear(mlp.gate_proj, mlp.up_proj), _FusedLinear(mlp.down_proj)
        self._activate = mlp.act_fn
        kv_heads: int = attention.k_proj.out_features // self._head_dim
        self._heads = (kv_heads, attention.q_proj.out_features // self._head_dim // kv_heads)
        self._norm_heads = _head_norm(attention, *self._heads)

    def __call__(self, number: int, hidden: Tensor, rotate: _Rotation, plan: AttentionPlan) -> Tensor:
        hidden = self._attend(number, self._attention_norm(hidden), rotate, plan).add_(hidden)
        gate, up = self._gate_up(self._mlp_norm(hidden)).chunk(2, -1)
        return self._down(self._activate(gate).mul_(up)).add_(hidden)

    def _attend(self, number: int, x: Tensor, rotate: _Rotation, plan: AttentionPlan) -> Tensor:
        kv_heads, groups = self._heads
        heads = self._qkv(x).view(len(x), -1, self._head_dim)
        rotated = rotate(self._norm_heads(heads[:, :-kv_heads]))
        query = rotated[:, :-kv_heads].view(len(x), kv_heads, groups, self._head_dim)
        key, value = rotated[:, -kv_heads:].transpose(0, 1), heads[:, -kv_heads:].transpose(0, 1)
        out = plan.attend(number, query.transpose(0, 1), key, value, self._scores)
        return self._output(out.transpose(0, 1).reshape(len(x), -1))


class _FusedLinear:
    """Linear layers with the same input, computed as one product; adapters add to each layer's part of the output."""

    def __init__(self, *layers: Any) -> None:
        self._layers = [_lora_linear(layer) for layer in layers]
        self._product = PackedLinear([layer.weight for layer in layers], [layer.bias for layer in layers])
        self._sizes = [len(layer.weight) for layer in layers]

    def __call__(self, x: Tensor) -> Tensor:
        """[N, sum of out] for `x` [N, in]."""
        out = self._product(x)
        for layer, part in zip(self._layers, out.split(self._sizes, -1), strict=True):
            layer.add_deltas(part, x)
        return out


def _lora_linear(layer: Any) -> LoraLinear:
    """The `LoraLinear` that computes `layer`; a new one without adapters if the layer has none."""
    owner = layer.forward.__self__
    return owner if isinstance(owner, LoraLinear) else LoraLinear(FrozenLinear(layer))


def _norm(norm: Any) -> Callable[[Tensor], Tensor]:
    """Root mean square norm (arXiv 1910.07467) of [N, H]."""
    shape, weight, eps = norm.weight.shape, norm.weight, _epsilon(norm)
    return lambda x: torch.nn.functional.rms_norm(x, shape, weight, eps)


def _head_norm(attention: Any, kv_heads: int, groups: int) -> Callable[[Tensor], Tensor]:
    """Qwen3's norm of query and key heads [N, heads, D] before the rotation; the identity for other models."""
    if not hasattr(attention, "q_norm"):
        return lambda heads: heads
    query, key = attention.q_norm, attention.k_norm
    weight = torch.cat([query.weight.expand(kv_heads * groups, -1), key.weight.expand(kv_heads, -1)])
    eps = _epsilon(query)
    return lambda heads: torch.nn.functional.rms_norm(heads, weight.shape[1:], eps=eps).mul_(weight)


def _epsilon(norm: Any) -> float:
    """transformers names torch's `eps` `variance_epsilon`."""
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
