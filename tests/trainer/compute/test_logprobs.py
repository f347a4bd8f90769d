"""Packed rows through the policy are what PEFT and transformers make of each row alone: values and gradients."""

import functools
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from agl_trainer.compute.logprobs import row_logprobs
from agl_trainer.data.rows import RowLogprobs, TrainingRow
from agl_trainer.data.truncation import Truncation, is_left_out
from agl_trainer.model.policy import Policy
from tests.trainer.small_model import plain_logits, plain_model, small_model, small_policy

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text"]
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
CASES = [
    (family, dtype)
    for family in FAMILIES
    for dtype in TOLERANCES
    # transformers' own attention of Gemma 2 takes the softmax in float32, whatever the model is in.
    if (family, dtype) != ("gemma2", torch.float64)
]
Rows = list[list[int]]


def sampled_rows(seed: int) -> tuple[Rows, Rows]:
    """Rows as a group gives them, with masks: shared prompts, forks at many depths, one inside another, a double."""
    draw = random.Random(seed)
    tokens = functools.partial(draw.choices, range(400))
    prompt, other = tokens(k=17), tokens(k=5)
    turns = prompt + tokens(k=6)
    rows = [prompt + tokens(k=4), prompt + tokens(k=9), turns + tokens(k=3), turns + tokens(k=8), turns]
    rows += [other + tokens(k=3), other + tokens(k=1), tokens(k=2), turns]
    return rows, [[0] + [int(draw.random() < 0.5) for _ in row[2:]] + [1] for row in rows]


def to_rows(rows: Rows, masks: Rows) -> list[TrainingRow]:
    return [TrainingRow(row, mask, 1.0) for row, mask in zip(rows, masks, strict=True)]


def weights_of(result: RowLogprobs) -> Tensor:
    """Another weight for each trained token, so that gradients cannot be right by symmetry."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(result.mask.shape, generator=generator, dtype=torch.float64) * result.mask


def plain_rows(model: torch.nn.Module, rows: Rows, masks: Rows) -> tuple[list[Tensor], list[Tensor]]:
    """Logprobs and entropies of the trained tokens of each row, computed on each row alone."""
    logprobs, entropies = [], []
    for row, mask in zip(rows, masks, strict=True):
        scores = plain_logits(model, row)[:-1].log_softmax(-1)
        trained = torch.tensor(mask[1:], dtype=torch.bool)
        logprobs.append(scores.gather(1, torch.tensor(row[1:])[:, None])[trained, 0])
        entropies.append(torch.distributions.Categorical(logits=scores.detach()).entropy()[trained])
    return logprobs, entropies


def distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Relative distance of two lists of tensors, all of them taken as one vector."""
    one, other = (torch.cat([tensor.detach().flatten() for tensor in side]).double() for side in (found, expected))
    return ((one - other).norm() / other.norm()).item()


def check(policy: Policy, model: torch.nn.Module, tolerance: float) -> None:
    rows, masks = sampled_rows(seed=1)
    assert max(map(len, rows)) > 24, "longer than the windows of small models"
    result = row_logprobs(policy, "writer", to_rows(rows, masks))
    weights = weights_of(result)
    loss = (result.logprobs * weights).sum()
    loss.backward()
    logprobs, entropies = plain_rows(model, rows, masks)
    plain_loss = torch.cat(logprobs) @ weights[result.mask].to(logprobs[0])
    plain_loss.backward()
    assert result.mask.sum(1).tolist() == [sum(mask) for mask in masks]
    assert distance([result.logprobs[result.mask]], logprobs) < tolerance
    assert distance([result.entropies[result.mask]], entropies) < tolerance
    assert abs(loss.item() / plain_loss.item() - 1) < tolerance
    grads = [parameter.grad for parameter in policy.parameters("writer")]
    plain_grads = [parameter.grad for name, parameter in model.named_parameters() if "lora_" in name]
    assert len(grads) == len(plain_grads) == 28
    for grad, plain_grad in zip(grads, plain_grads, strict=True):
        assert grad is not None and plain_grad is not None
        assert distance([grad], [plain_grad]) < tolerance * 10
    assert distance([grad for grad in grads if grad is not None], [g for g in plain_grads if g is not None]) < tolerance
    assert all(parameter.grad is None for parameter in policy.parameters("fixer"))


@pytest.mark.parametrize("kv_heads", [1, 3], ids=["groups-3", "groups-1"])
@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_logprobs_entropies_and_gradients_are_those_of_each_row_alone(
    family: str, kv_heads: int, dtype: torch.dtype
) -> None:
    make = functools.partial(small_model, family, kv_heads=kv_heads, dtype=dtype)
    policy = small_policy(make())
    check(policy, plain_model(policy, "writer", make()), TOLERANCES[dtype])


@pytest.mark.parametrize(("family", "dtype"), [("llama", torch.float64), ("gemma2", torch.float32)])
def test_padded_rows_give_the_same(family: str, dtype: torch.dtype) -> None:
    make = functools.partial(small_model, family, dtype=dtype)
    policy = small_policy(make(), packs=False)
    check(policy, plain_model(policy, "writer", make()), TOLERANCES[dtype])
    rows, masks = sampled_rows(seed=1)
    assert row_logprobs(policy, "writer", to_rows(rows, masks)).distinct_tokens == len(rows) * max(map(len, rows))


def test_only_distinct_tokens_are_computed() -> None:
    rows, masks = sampled_rows(seed=1)
    result = row_logprobs(small_policy(), "writer", to_rows(rows, masks))
    assert result.distinct_tokens == len({tuple(row[:end]) for row in rows for end in range(1, len(row) + 1)})
    assert result.distinct_tokens < sum(map(len, rows)) / 2


def test_many_chunks_of_the_output_layer_are_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, masks = sampled_rows(seed=2)
    policy = small_policy(small_model(dtype=torch.float64))
    whole = row_logprobs(policy, "writer", to_rows(rows, masks))
    monkeypatch.setattr("agl_trainer.compute.logprobs._CHUNK", 7)
    parts = row_logprobs(policy, "writer", to_rows(rows, masks))
    assert distance([parts.logprobs, parts.entropies], [whole.logprobs, whole.entropies]) < 1e-12


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_a_pass_without_gradient_multiplies_by_the_output_layer_once(entropy_gradient: bool) -> None:
    """Once for the logits; with gradient once more for the derivatives of the logprobs, and of the entropies."""
    policy = small_policy()
    vocabulary, width = policy.output_weight.shape
    rows = to_rows([[1, 2, 3, first, 5, 6] for first in range(10)], [[0, 0, 0, 1, 1, 1]] * 10)

    def operations() -> int:
        with FlopCounterMode(display=False) as counter:
            row_logprobs(policy, "writer", rows, entropy_gradient=entropy_gradient)
        return counter.get_total_flops()

    with_gradient = operations()
    with torch.no_grad():
        without = operations()
    assert with_gradient - without == (1 + entropy_gradient) * 2 * 30 * width * vocabulary


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_temperatures_and_the_gradient_of_the_entropy_are_those_of_each_row_alone(entropy_gradient: bool) -> None:
    """Two rows that share a trained token, sampled at two temperatures."""
    policy, model = small_policy(small_model(dtype=torch.float64)), small_model(dtype=torch.float64)
    plain = plain_model(policy, "writer", model)
    ids, masks, temperatures = (
        [[5, 6, 7, 8], [5, 6, 7, 9]],
        [[0, 0, 1, 1]] * 2,
        [[1.0, 1.0, 0.5, 0.5], [1.0, 1.0, 2.0, 1.0]],
    )
    rows = [
        TrainingRow(*row, 1.0, temperatures=t)
        for row, t in zip(zip(ids, masks, strict=True), temperatures, strict=True)
    ]
    result = row_logprobs(policy, "writer", rows, entropy_gradient=entropy_gradient)
    logprobs, entropies = [], []
    for row, tau in zip(ids, temperatures, strict=True):
        scores = (plain_logits(plain, row)[:-1] / torch.tensor(tau[1:])[:, None]).log_softmax(-1)
        logprobs.append(scores.gather(1, torch.tensor(row[1:])[:, None])[1:, 0])
        entropies.append(torch.distributions.Categorical(logits=scores).entropy()[1:])
    assert distance([result.logprobs, result.entropies], [*logprobs, *entropies]) < 1e-12
    weights = weights_of(result)
    loss, plain_loss = (result.logprobs * weights).sum(), (torch.stack(logprobs) * weights).sum()
    if entropy_gradient:
        loss, plain_loss = (
            loss + (result.entropies * weights).sum(),
            plain_loss + (torch.stack(entropies) * weights).sum(),
        )
    loss.backward()
    plain_loss.backward()
    grads = [parameter.grad for parameter in policy.parameters("writer") if parameter.grad is not None]
    plain_grads = [p.grad for name, p in plain.named_parameters() if "lora_" in name and p.grad is not None]
    assert len(grads) == len(plain_grads) == 28
    assert distance(grads, plain_grads) < 1e-9
    assert result.entropies.requires_grad == entropy_gradient


def test_padding_is_zero() -> None:
    result = row_logprobs(small_policy(), "writer", to_rows([[1, 2, 3], [1, 2]], [[0, 1, 1], [0, 1]]))
    assert result.mask.tolist() == [[True, True], [True, False]]
    assert result.logprobs[1, 1] == result.entropies[1, 1] == 0
    assert result.logprobs[0, 0] == result.logprobs[1, 0] < 0


@pytest.mark.parametrize("bad", [0, 1])
def test_a_first_token_that_trains_is_refused_by_its_row(bad: int) -> None:
    masks = [[0, 1], [0, 1]]
    masks[bad] = [1, 1]
    with pytest.raises(ValueError, match=f"row {bad}: its first token has mask 1"):
        row_logprobs(small_policy(), "writer", to_rows([[1, 2], [3, 4]], masks))


def test_a_truncation_leaves_out_tokens_in_values_and_gradients() -> None:
    """As plain autograd with the other logits at -inf; a trained token that is not among the kept ones is kept."""
    policy = small_policy(small_model(dtype=torch.float64))
    row, truncation, temperature = [5, 6, 7, 8, 9], Truncation(top_p=0.9, top_k=4, min_p=0.05), 0.8
    options: dict[str, Any] = {"temperatures": [temperature] * 5, "truncation": truncation}
    result = row_logprobs(policy, "writer", [TrainingRow(row, [0, 1, 1, 1, 1], 1.0, **options)])
    result.logprobs.sum().backward()
    found = [parameter.grad for parameter in policy.parameters("writer")]

    model = plain_model(policy, "writer", small_model(dtype=torch.float64))
    logits, targets = plain_logits(model, row)[:-1] / temperature, torch.tensor(row[1:])[:, None]
    left_out = is_left_out(logits.detach(), [truncation] * 4).scatter(1, targets, False)
    assert all(2 <= count <= 5 for count in (~left_out).sum(1).tolist())
    scores = logits.masked_fill(left_out, -torch.inf).log_softmax(-1)
    logprobs = scores.gather(1, targets)[:, 0]
    logprobs.sum().backward()
    assert torch.allclose(result.logprobs[0], logprobs, rtol=1e-9)
    entropies = torch.distributions.Categorical(logits=scores.detach()).entropy()
    assert torch.allclose(result.entropies[0], entropies, rtol=1e-9)
    expected = [parameter.grad for name, parameter in model.named_parameters() if "lora_" in name]
    assert distance([one for one in found if one is not None], [one for one in expected if one is not None]) < 1e-9
    with pytest.raises(ValueError, match="different truncations"):
        row_logprobs(
            policy, "writer", [TrainingRow(row, [0, 1, 1, 1, 1], 1.0, truncation=t) for t in (truncation, Truncation())]
        )
