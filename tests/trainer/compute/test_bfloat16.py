"""Base weights in bfloat16, as on accelerators, computed on the CPU: what rounding may change, and what it may not."""

import asyncio
import random

import pytest
import torch

from agl.config import PolicyLossConfig
from agl_trainer.compute.logprobs import row_logprobs
from agl_trainer.compute.optimizer_step import optimizer_step
from agl_trainer.compute.train_batch import prepare_objective
from agl_trainer.data.prefix_tree import pack_rows
from agl_trainer.data.rows import SampledRow, TrainingRow
from agl_trainer.engine.protocol import SamplingParams
from agl_trainer.engine.vllm.verification import verify
from agl_trainer.model.attention import PackedPlan
from agl_trainer.model.lora import BASE
from agl_trainer.model.policy import Policy
from tests.trainer.engine.test_scheduler import collect, engine
from tests.trainer.small_model import ROLES, small_model, small_policy

TOKENS = random.Random(0).choices(range(400), k=60)


@pytest.fixture
def policy() -> Policy:
    return small_policy(small_model(dtype=torch.bfloat16), adapter_std=0.05)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_logits_are_not_rounded_to_bfloat16(family: str) -> None:
    """For logprobs of the trainer and of the engine, against the product in float64 of the same hidden states."""
    policy = small_policy(small_model(family, dtype=torch.bfloat16))
    packed = pack_rows([TOKENS])
    hidden = policy.hidden_states(packed.token_ids, packed.positions, ["writer"], PackedPlan(packed))
    exact = hidden.double() @ policy.output_weight.double().T
    logits = policy.logits(hidden)
    assert logits.dtype == torch.float32
    assert torch.allclose(logits.double(), exact, rtol=0, atol=1e-5 * float(exact.abs().max()))
    if policy.output_softcap:
        exact = policy.output_softcap * (exact / policy.output_softcap).tanh()
    expected = exact[:-1].log_softmax(-1).gather(1, torch.tensor(TOKENS[1:])[:, None])[:, 0]
    row = TrainingRow(TOKENS, [0] + [1] * (len(TOKENS) - 1), 1.0)
    found = row_logprobs(policy, "writer", [row]).logprobs[0].double()
    assert torch.allclose(found, expected, rtol=0, atol=1e-4)
    rounded = exact.bfloat16().double()[:-1].log_softmax(-1).gather(1, torch.tensor(TOKENS[1:])[:, None])[:, 0]
    assert not torch.allclose(rounded, expected, rtol=0, atol=1e-4)


async def sampled_rows(policy: Policy) -> list[SampledRow]:
    prompt = TOKENS[:20]
    async with engine(policy) as scheduler:
        params = [SamplingParams(24, temperature=1.0, seed=seed) for seed in range(12)]
        answers = await asyncio.gather(*(collect(scheduler.submit(prompt, "writer", one)) for one in params))
    rows = []
    for number, answer in enumerate(answers):
        ids, logprobs = [token.token_id for token in answer], [token.logprob for token in answer]
        advantages = [float(number % 3 - 1)] * (len(prompt) + len(ids))
        mask = [0] * len(prompt) + [1] * len(ids)
        rows.append(SampledRow([*prompt, *ids], mask, 1 / 12 / len(ids), [0.0] * len(prompt) + logprobs, advantages))
    return rows


async def test_sampled_and_recomputed_logprobs_agree(policy: Policy) -> None:
    """The ratio's statistics of an on-policy step show rounding only, and the step's gradient is float32's."""
    rows = await sampled_rows(policy)
    exact = small_policy(small_model(dtype=torch.bfloat16).float(), adapter_std=0.05)
    norms = []
    for one in (policy, exact):
        objective = prepare_objective(one, "writer", rows, PolicyLossConfig(), pack_tokens=None, is_first=True)
        optimizer = torch.optim.SGD(one.parameters("writer"), lr=0.0)
        metrics = optimizer_step(one, "writer", optimizer, rows, objective, pack_tokens=None, max_grad_norm=1.0).metrics
        assert metrics["ratio_p50"] == pytest.approx(1, abs=0.01)
        assert metrics["ratio_p05"] > 0.95 and metrics["ratio_p95"] < 1.05
        assert 0 <= metrics["kl"] < 1e-3 and metrics["clip_fraction"] == 0
        norms.append(metrics["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=0.03)


def test_the_proof_holds_between_bfloat16_and_float32(policy: Policy) -> None:
    """A trainer in bfloat16, and an engine whose sums are exact: rounding hides no adapter."""
    exact = small_policy(small_model(dtype=torch.bfloat16).float(), adapter_std=0.05)
    row = TrainingRow(TOKENS, [0] + [1] * (len(TOKENS) - 1), 1.0)
    for role in ROLES:
        with torch.no_grad():
            (trainer, base), (engine_found, engine_base) = (
                tuple(row_logprobs(one, name, [row]).logprobs[0] for name in (role, BASE)) for one in (policy, exact)
            )
        verification = verify(f"{role}@1", engine_found - engine_base, trainer - base)
        assert verification.share == pytest.approx(1, abs=0.1)
