"""Compiled layers: same losses and gradients, no recompilation for another tree of tokens, unchanged sampling."""

import itertools
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from agl.errors import ConfigError
from agl_trainer.data.prefix_tree import pack_rows
from agl_trainer.model.attention import PackedPlan
from agl_trainer.model.compiled import CompiledLayer, compile_error, compile_layers
from agl_trainer.model.policy import Policy
from tests.trainer.compute.test_prefix import step
from tests.trainer.model.test_packing_probe import odd_model
from tests.trainer.model.test_recompute import gradient, sample
from tests.trainer.small_model import small_model, small_policy


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """Limits torch to one compiled variant per function."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(cache_size_limit=1):
        yield
    torch._dynamo.reset()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs traced graphs without inductor, which takes seconds per graph."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def codes() -> int:
    """Number of compiled graphs so far."""
    return counters["stats"]["unique_graphs"]


def train(policy: Policy, rows: list[list[int]], role: str = "writer") -> Tensor:
    """The gradient of a pass over `rows`."""
    packed = pack_rows(rows)
    states = policy.hidden_states(packed.token_ids, packed.positions, [role], PackedPlan(packed))
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(states.square().sum(), policy.parameters(role))])


@torch._dynamo.config.patch(assume_static_by_default=False)  # at once what the second size would bring
def test_compiled_layers_have_the_same_loss_and_gradient() -> None:
    models = [small_model(dtype=torch.float64) for _ in range(2)]
    loss, expected, _ = step(small_policy(models[0]), 130)
    compiled_loss, found, _ = step(small_policy(models[1], compiles=True, recomputes=True), 130)
    assert math.isclose(compiled_loss, loss, rel_tol=1e-9)
    assert expected.norm() > 0
    assert (found - expected).norm() <= 1e-9 * expected.norm()


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    ("make", "recomputes"), [(small_model, False), (partial(odd_model, "bloom"), True)], ids=["llama", "bloom"]
)
def test_padded_rows_have_the_same_gradient(make: Any, recomputes: bool) -> None:
    expected = gradient(small_policy(make(), packs=False), "writer", 500)
    found = gradient(small_policy(make(), packs=False, compiles=True, recomputes=recomputes), "writer", 500)
    assert expected.norm() > 0
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert codes() > 1


@pytest.mark.usefixtures("traced")
def test_other_trees_and_sizes_are_not_compiled_again() -> None:
    plain, policy = (small_policy(small_model(dtype=torch.float64), compiles=compiles) for compiles in (False, True))
    trees = [[[100 + size] * (3 + size) + [last] for last in range(size)] for size in range(1, 6)]
    before, made = codes(), []
    for role, tree in itertools.product(("writer", "fixer"), trees):
        expected, found = train(plain, tree, role), train(policy, tree, role)
        assert (found - expected).norm() <= 1e-9 * expected.norm()
        made.append(codes() - before)
    first, second, *others = made[:5]
    assert 0 < first < second <= 2 * first  # the second makes the number of tokens a variable
    assert set(others) == {second}
    assert second < made[5] <= second + first
    assert set(made[5:]) == {made[5]}


@pytest.mark.usefixtures("traced")
def test_layers_share_their_code() -> None:
    found = []
    for layers in (2, 5):
        torch._dynamo.reset()
        policy, before = small_policy(small_model(layers=layers), compiles=True), codes()
        train(policy, [[1, 2, 3]])
        found.append(codes() - before)
    assert found[0] == found[1] > 0


@pytest.mark.usefixtures("traced")
def test_sampling_is_not_compiled() -> None:
    plain, compiled = small_policy(), small_policy(compiles=True)
    before = codes()
    assert torch.equal(sample(plain), sample(compiled))
    assert codes() == before


@pytest.mark.usefixtures("traced")
def test_each_layer_is_wrapped_once() -> None:
    model = small_model(layers=3)
    small_policy(model, compiles=True)
    assert sum(isinstance(module.forward, CompiledLayer) for module in model.modules()) == 3


def test_a_model_without_marked_layers_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"train.compile: a Linear has no layers"):
        compile_layers(torch.nn.Linear(2, 2))


def test_the_error_without_a_compiler_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    missing = torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")})
    monkeypatch.setattr("agl_trainer.model.compiled.compile_error", compile_error.__wrapped__)
    with missing, pytest.raises(ConfigError, match=r"train.compile: .*No working C\+\+ compiler.*install"):
        small_policy(compiles=True)
