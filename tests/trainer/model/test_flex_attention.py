"""The block mask used on GPUs gives the values and gradients of the segments, computed here on a CPU."""

import functools
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from agl_trainer.data.prefix_tree import PackedRows, pack_rows
from agl_trainer.model import flex_attention
from agl_trainer.model.attention import PackedPlan
from agl_trainer.model.block_attention import ScoreOptions
from tests.trainer.compute.test_prefix import step
from tests.trainer.model.test_attention import SCORES
from tests.trainer.small_model import small_model, small_policy

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
KV_HEADS, GROUPS, WIDTH = 2, 3, 16


@pytest.fixture(autouse=True)
def _gradients_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch rejects gradients on a CPU, although it can compute them without a compiled kernel."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)


def tree(prompt_tokens: int) -> list[list[int]]:
    """Rows with nested branches, some of which are prefixes of others."""
    draw = random.Random(prompt_tokens)
    prompt = draw.choices(range(50), k=prompt_tokens)
    turn = prompt + draw.choices(range(50), k=45)
    return [[*prompt, 60], prompt + draw.choices(range(50), k=90), [*turn, 1], [*turn, 2, 3, 4], turn, prompt[:-20]]


class TwoPiecePrefix:
    """Keys and values of the first tokens, in two pieces, as for a prefix below a prefix."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.end = key.shape[1]
        self._pieces = list(zip(key.split(60, 1), value.split(60, 1), strict=True))

    def attended(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        return self._pieces


def attend(packed: PackedRows, start: int, scores: ScoreOptions) -> list[Tensor]:
    """Output for the tokens from `start` on, and the gradients of query, key and value."""
    generator, count = torch.Generator().manual_seed(0), len(packed.token_ids)
    shapes = [(KV_HEADS, count - start, GROUPS, WIDTH), *[(KV_HEADS, count, WIDTH)] * 2]
    query, key, value = (torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes)
    known = TwoPiecePrefix(key[:, :start], value[:, :start]) if start else None
    out = PackedPlan(packed, known).attend(0, query, key[:, start:], value[:, start:], scores)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    return [out, *torch.autograd.grad(out, (query, key, value), grad)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("scores", SCORES, ids=["plain", "window", "softcap", "both"])
@pytest.mark.parametrize("start", [0, 100], ids=["whole", "below a prefix"])
def test_the_mask_gives_the_values_and_gradients_of_the_segments(
    start: int, scores: ScoreOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = pack_rows(tree(150) if start else [*tree(150), *tree(70)])
    expected = attend(packed, start, scores)
    monkeypatch.setattr(flex_attention, "is_supported", lambda _: True)
    assert_same(attend(packed, start, scores), expected)


LISTS = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")


@pytest.mark.parametrize("seed", range(12))
def test_the_mask_is_that_of_comparing_all_pairs(seed: int) -> None:
    draw = random.Random(seed)
    prompts = [draw.choices(range(3), k=draw.randrange(1, 700)) for _ in range(4)]
    rows = [draw.choice(prompts)[: draw.randrange(1, 700)] + draw.choices(range(3), k=40) for _ in range(9)]
    packed = pack_rows(rows)
    count = len(packed.positions)
    for start in (0, draw.randrange(count), count - 1):
        for window in (None, 1, draw.randrange(1, 500)):
            found = flex_attention.tree_mask(packed, start, window)
            expected = create_block_mask(found.mask_mod, None, None, count - start, count, device="cpu")
            assert found.shape == expected.shape
            for name in (*LISTS, *(name.replace("kv", "q") for name in LISTS)):
                assert torch.equal(getattr(found, name), getattr(expected, name)), name


class LargestTensor(TorchDispatchMode):
    """Size in bytes of the largest tensor that an operation returns."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.nbytes)
        return out


@pytest.mark.parametrize("window", [None, 4096])
def test_a_mask_of_32768_tokens_takes_little_memory_to_build(window: int | None) -> None:
    """As one boolean matrix it would take 1 GiB."""
    packed = pack_rows([[0] * 8192 + [number] * 3072 for number in range(1, 9)])
    with LargestTensor() as largest:
        mask = flex_attention.tree_mask(packed, 0, window)
    assert mask.shape == (1, 1, 32768, 32768)
    assert largest.bytes < 2**24


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Compiles as for a GPU except the kernel itself: the forward and backward graphs run as traced.

    Uncompiled, torch computes a wrong gradient if the backward pass recomputes the attention.
    """
    torch.compiler.reset()
    found = CompileCounterWithBackend("aot_eager")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend=found))
        compiled = flex_attention.compiled_kernel.__wrapped__()
    monkeypatch.setattr(flex_attention, "flex_attention", compiled)
    return found


def test_one_compilation_serves_other_lengths_windows_and_softcaps(
    counter: CompileCounterWithBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = []
    for prompt_tokens, start, window, cap in [
        (300, 0, None, 2.0),
        (420, 150, 7, 2.0),
        (350, 0, 5, 3.0),
        (600, 9, 6, 0.5),
    ]:
        packed, scores = pack_rows(tree(prompt_tokens)), ScoreOptions(0.3, window, cap)
        expected = attend(packed, start, scores)
        with monkeypatch.context() as patch:
            patch.setattr(flex_attention, "is_supported", lambda _: True)
            assert_same(attend(packed, start, scores), expected)
        graphs.append(counter.frame_count)
    whole, below_a_prefix, *others = graphs
    assert 0 < whole < below_a_prefix
    assert set(others) == {below_a_prefix}


@pytest.mark.usefixtures("counter")
@pytest.mark.parametrize("recomputes", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("pack_tokens", [4096, 130], ids=["one pass", "prefix below prefix"])
def test_a_policy_has_the_same_loss_and_gradient(
    pack_tokens: int, recomputes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some layers have a window, others none; each pass makes one mask for each kind."""
    policy = small_policy(small_model("gemma2", dtype=torch.float64), recomputes=recomputes)
    loss, gradient, _ = step(policy, pack_tokens)
    make, made = flex_attention.tree_mask, []

    def tree_mask(packed: PackedRows, start: int, window: int | None) -> BlockMask:
        made.append((packed, window))
        return make(packed, start, window)

    monkeypatch.setattr(flex_attention, "is_supported", lambda _: True)
    monkeypatch.setattr(flex_attention, "tree_mask", tree_mask)
    other_loss, other_gradient, _ = step(policy, pack_tokens)
    assert other_loss == pytest.approx(loss, rel=1e-9)
    assert (other_gradient - gradient).norm() < 1e-9 * gradient.norm()
    assert {window for _, window in made} == {12, None}
    assert len({(id(packed), window) for packed, window in made}) == len(made)


@pytest.mark.parametrize("why", [None, "torch cannot compile here: no compiler"])
def test_only_gpus_and_common_head_dims_are_supported(
    why: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(flex_attention, "compile_error", lambda _: why)
    flex_attention.can_compile.cache_clear()
    with FakeTensorMode():
        found = [
            (device, width)
            for device in ("cpu", "cuda")
            for width in (8, 16, 64, 96, 128, 512)
            if flex_attention.is_supported(torch.empty(1, 3, 5, width, device=device))
        ]
    flex_attention.can_compile.cache_clear()
    assert found == ([] if why else [("cuda", 16), ("cuda", 64), ("cuda", 128)])
    assert [record.getMessage().partition(": until")[0] for record in caplog.records] == ([why] if why else [])
