"""Attention over a prefix tree equals attention with a mask, in values and gradients, for every backend."""

import random

import pytest
import torch
from torch import Tensor

from agl_trainer.data.prefix_tree import PackedRows, pack_rows
from agl_trainer.model.attention import PackedPlan
from agl_trainer.model.block_attention import FlashBackend, MatmulBackend, ScoreOptions, choose_backend

KV_HEADS, GROUPS, WIDTH = 2, 3, 8
SCORES = [
    ScoreOptions(0.3),
    ScoreOptions(0.3, window=6),
    ScoreOptions(0.3, softcap=2.0),
    ScoreOptions(0.3, window=1, softcap=0.5),
]


def rows() -> PackedRows:
    draw = random.Random(0)
    prompt, other = draw.choices(range(50), k=9), draw.choices(range(50), k=3)
    turn = prompt + draw.choices(range(50), k=5)
    return pack_rows([[*prompt, 60], [*prompt, 61, 62], [*turn, 1], [*turn, 2, 3, 4], [*other, 5], other])


def tensors(packed: PackedRows) -> list[Tensor]:
    """Query, key, value and the gradient of the output."""
    generator, count = torch.Generator().manual_seed(0), len(packed.token_ids)
    shapes = [(KV_HEADS, count, GROUPS, WIDTH), *[(KV_HEADS, count, WIDTH)] * 2, (KV_HEADS, count, GROUPS, WIDTH)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


def seen(packed: PackedRows, window: int | None) -> Tensor:
    """Mask [N, N]: the key is in the query's row, no later than the query, and within `window`."""
    found = torch.zeros(len(packed.token_ids), len(packed.token_ids), dtype=torch.bool)
    for index in packed.row_index:
        for depth, place in enumerate(index.tolist()):
            found[place, index[: depth + 1]] = True
    before = packed.positions[:, None] - packed.positions
    return found & (before < (window or len(found)))


def dense(packed: PackedRows, query: Tensor, key: Tensor, value: Tensor, scores: ScoreOptions) -> Tensor:
    made = torch.einsum("hngd,hmd->hngm", query, key) * scores.scale
    if scores.softcap is not None:
        made = torch.tanh(made / scores.softcap) * scores.softcap
    hidden = ~seen(packed, scores.window)
    return torch.einsum("hngm,hmd->hngd", made.masked_fill(hidden[:, None], -torch.inf).softmax(-1), value)


@pytest.mark.parametrize("scores", SCORES, ids=["plain", "window", "softcap", "both"])
def test_values_and_gradients_equal_masked_attention(scores: ScoreOptions) -> None:
    packed = rows()
    query, key, value, grad = tensors(packed)
    found = PackedPlan(packed).attend(0, query, key, value, scores)
    expected = dense(packed, query, key, value, scores)
    assert torch.allclose(found, expected, atol=1e-12)
    grads = [torch.autograd.grad(out, (query, key, value), grad) for out in (found, expected)]
    for one, other in zip(*grads, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def test_the_backends_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests the backend that GPUs use on this CPU."""
    packed = rows()
    *given, grad = tensors(packed)
    plan, found = PackedPlan(packed), []
    for kernel in (FlashBackend(0.3), MatmulBackend(ScoreOptions(0.3), packed.positions)):
        monkeypatch.setattr("agl_trainer.model.attention.choose_backend", lambda *_, kernel=kernel: kernel)
        out = plan.attend(0, given[0], given[1], given[2], ScoreOptions(0.3))
        found.append([out, *torch.autograd.grad(out, given, grad)])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


@pytest.mark.parametrize(
    "scores", [ScoreOptions(0.3), ScoreOptions(0.3, window=6, softcap=2.0)], ids=["flash", "plain"]
)
def test_bfloat16_adds_no_rounding_beyond_its_inputs(scores: ScoreOptions) -> None:
    packed = rows()
    *given, grad = tensors(packed)
    halves = [tensor.detach().bfloat16().requires_grad_() for tensor in given]
    out = PackedPlan(packed).attend(0, halves[0], halves[1], halves[2], scores)
    expected = dense(packed, given[0], given[1], given[2], scores)
    found = [out, *torch.autograd.grad(out, halves, grad.bfloat16())]
    for one, other in zip(found, [expected, *torch.autograd.grad(expected, given, grad)], strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.double() - other).norm() < 0.02 * other.norm()


def test_the_flash_backend_is_chosen_for_plain_scores_on_a_cpu() -> None:
    positions = torch.arange(3)
    assert isinstance(choose_backend(ScoreOptions(1.0), positions), FlashBackend)
    assert isinstance(choose_backend(ScoreOptions(1.0, window=2), positions), MatmulBackend)
    assert isinstance(choose_backend(ScoreOptions(1.0), positions.to("meta")), MatmulBackend)
