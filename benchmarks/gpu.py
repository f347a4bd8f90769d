"""Checks the trainer on the accelerator of this machine, and measures it: a table, and exit code 1 if a check fails.

make gpu-folder && cd build/gpu && python gpu.py         on any machine with torch, transformers, peft and accelerate
make test-gpu                                            on this one

It needs no network and no weights: models are random, two of them in the shapes of Qwen2.5 with 0.5B and 7B parameters.
Packages that are missing are installed from the folder `wheels` beside this file into a temporary folder. Without an
accelerator, or with --small, all models are tiny and nothing is expected of their speed.
"""

import argparse
import asyncio
import importlib.util
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

WHEELS = Path(__file__).parent / "wheels"


def install_missing() -> None:
    """Install the packages of `wheels`, without dependencies, and put them before those of the machine."""
    if importlib.util.find_spec("agl_trainer") is not None:
        return
    target = tempfile.mkdtemp()
    names = sorted({path.name.partition("-")[0] for path in WHEELS.glob("*.whl")})
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--find-links", str(WHEELS)]
    subprocess.run([*pip, "--target", target, *names], check=True)
    sys.path.insert(0, target)


install_missing()

import torch
import torch.distributed as dist
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config

from agl.config import RoleConfig
from agl_trainer.algo.sft_loss import sft_loss
from agl_trainer.compute.devices import process_group
from agl_trainer.compute.gradient import accumulate_gradient, clear_gradient
from agl_trainer.compute.logprobs import row_logprobs
from agl_trainer.compute.optimizer_step import StepStats, optimizer_step
from agl_trainer.data.rows import TrainingRow
from agl_trainer.engine.local.scheduler import Scheduler
from agl_trainer.engine.protocol import SampledToken, SamplingParams
from agl_trainer.loop import rng
from agl_trainer.loop.checkpoint import Checkpoint, load_latest, save_checkpoint
from agl_trainer.model import flex_attention
from agl_trainer.model.base_model import load_model
from agl_trainer.model.device import best_device, has_flex_attention
from agl_trainer.model.policy import Policy
from agl_trainer.model.tiny import build_tiny_model

ROLE = "writer"
TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}
HALF_B = {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
HALF_B |= {"num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True}
SEVEN_B = {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
SEVEN_B |= {"num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False}
MAX_SECONDS = 480


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the table."""

    check: str
    found: str
    expected: str = ""
    is_right: bool = True


@dataclass(frozen=True, slots=True)
class Machine:
    """Where the checks run, and the sizes of what they run."""

    device: torch.device
    is_small: bool

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.is_small else torch.bfloat16

    def seconds(self, run: Callable[[], Any], rounds: int = 3) -> float:
        """Median time of `run`, which has run once before."""
        run()
        times = []
        for _ in range(rounds):
            self.synchronize()
            started = time.perf_counter()
            run()
            self.synchronize()
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    def synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()


def make_model(shape: dict[str, Any], device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A random Qwen2 model, made on `device`; the same on each call."""
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(Qwen2Config(**shape), dtype=dtype)
    return model.eval().requires_grad_(False)


def make_policy(model: PreTrainedModel, **options: Any) -> Policy:
    """`model` with an adapter that matters, equal on all devices."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    policy = Policy(model, tokenizer, {ROLE: RoleConfig()}, base_name="base", seed=0, **options)
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.parameters(ROLE):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return policy


def make_rows(groups: int, rollouts: int, prompt: int, answer: int, vocabulary: int = 512) -> list[TrainingRow]:
    """Rollouts of `groups` prompts, with lengths in tokens; half of each answer is shared by two rollouts."""
    draw, rows = random.Random(0), []
    for _ in range(groups):
        shared = draw.choices(range(vocabulary), k=prompt)
        for number in range(rollouts):
            if number % 2 == 0:
                half = draw.choices(range(vocabulary), k=answer // 2)
            tokens = [*shared, *half, *draw.choices(range(vocabulary), k=answer - answer // 2)]
            rows.append(TrainingRow(tokens, [0] * prompt + [1] * answer, 1 / (groups * rollouts * answer)))
    return rows


def gradient(policy: Policy, rows: list[TrainingRow], pack_tokens: int | None = None) -> torch.Tensor:
    accumulate_gradient(policy, ROLE, rows, sft_loss, pack_tokens=pack_tokens, entropy_gradient=False)
    found = torch.cat([parameter.grad.flatten().cpu() for parameter in policy.parameters(ROLE)])
    clear_gradient(policy, ROLE)
    return found


def compare(check: str, found: torch.Tensor, expected: torch.Tensor, limit: float) -> Result:
    """By the norm of their difference, relative to `expected`; NaN is wrong."""
    distance = float((found - expected).norm() / expected.norm())
    return Result(check, f"{distance:.1e}", f"at most {limit:.0e}", distance <= limit)


def check_parity(machine: Machine) -> Iterator[Result]:
    rows = make_rows(2, 4, 40, 24)
    base = make_model(TINY, torch.device("cpu"), torch.float32)
    expected = gradient(make_policy(deepcopy(base)), rows)
    for name, options in (("packed", {}), ("padded", {"packs": False}), ("recomputed", {"recomputes": True})):
        found = gradient(make_policy(deepcopy(base).to(machine.device), **options), rows)
        yield compare(f"gradient, {name}: {machine.device} against CPU", found, expected, 1e-3)


def check_flex_attention(machine: Machine) -> Iterator[Result]:
    if not has_flex_attention(machine.device):
        yield Result("FlexAttention against segments", f"torch has no kernel for {machine.device}")
        return
    rows, shape = make_rows(2, 6, 300, 80), TINY | {"hidden_size": 256}
    for recomputes in (False, True):
        policy = make_policy(make_model(shape, machine.device, torch.float32), recomputes=recomputes)
        for tokens in (8192, 500):
            found = gradient(policy, rows, tokens)
            with mock.patch.object(flex_attention, "is_supported", lambda _: False):
                expected = gradient(policy, rows, tokens)
            name = f"FlexAttention against segments, passes of {tokens}{', recomputed' if recomputes else ''}"
            yield compare(name, found, expected, 2e-3)
    supported = flex_attention.can_compile(machine.device.type)
    yield Result("FlexAttention compiles", str(supported), "True", supported)


def matmul_flops(machine: Machine) -> float:
    size = 256 if machine.is_small else 8192
    left, right = torch.randn(2, size, size, device=machine.device).to(machine.dtype)
    return 2 * size**3 / machine.seconds(lambda: left @ right, 10)


def check_speed(machine: Machine) -> Iterator[Result]:
    """Steps of the two shapes, packed and padded, and the share of the rate of a product of large matrices."""
    peak = matmul_flops(machine)
    yield Result("product of large matrices", f"{peak / 1e12:.3g} TFLOP/s")
    shapes = {"tiny": TINY} if machine.is_small else {"0.5B": HALF_B, "7B": SEVEN_B}
    sizes = (2, 4, 32, 16) if machine.is_small else (2, 8, 512, 256)
    for name, shape in shapes.items():
        yield from _steps(machine, name, shape, make_rows(*sizes), peak)


def _steps(
    machine: Machine, name: str, shape: dict[str, Any], rows: list[TrainingRow], peak: float
) -> Iterator[Result]:
    model = make_model(shape, machine.device, machine.dtype)
    policy = make_policy(model)
    linear = sum(
        p.numel() for key, p in model.named_parameters() if p.dim() == 2 and "layers" in key and "lora" not in key
    )
    output = policy.output_weight.numel() * sum(sum(row.loss_mask) for row in rows)
    optimizer = torch.optim.AdamW(policy.parameters(ROLE), lr=1e-5)
    times = {}
    for way in ("packed", "padded"):
        policy.packs = way == "packed"
        model.set_attn_implementation("agl_tree" if policy.packs else "sdpa")
        stats: list[StepStats] = []

        def step() -> None:
            update = optimizer_step(policy, ROLE, optimizer, rows, sft_loss, pack_tokens=None, max_grad_norm=1.0)
            stats.append(update)  # noqa: B023 - called in this round of the loop only

        times[way] = machine.seconds(step)
        needed = 4 * (linear * stats[-1].distinct_tokens + output)  # forward, and backward to the inputs
        share = needed / times[way] / peak
        metrics = stats[-1].metrics
        is_right = not metrics["skipped"] and (machine.is_small or share > 0.1)
        tokens, norm = stats[-1].distinct_tokens, metrics["grad_norm"]
        found = f"{times[way]:.3f} s, {share:.0%} MFU, {tokens} tokens, gradient {norm:.2e}"
        yield Result(f"step of {name}, {way}", found, "" if machine.is_small else "more than 10% MFU", is_right)
    if not machine.is_small:
        yield Result(
            f"{name}: packed against padded",
            f"1/{times['padded'] / times['packed']:.1f} of its time",
            "less",
            times["packed"] < times["padded"],
        )


def check_engine(machine: Machine) -> Iterator[Result]:
    """Tokens per second, and that the trainer computes the logprobs that were sampled."""
    policy = make_policy(make_model(TINY if machine.is_small else HALF_B, machine.device, machine.dtype))
    count, length = (4, 8) if machine.is_small else (64, 64)
    prompt = make_rows(1, 1, 128, 2)[0].token_ids[:128]

    async def sample(scheduler: Scheduler) -> list[list[SampledToken]]:
        async def collect(seed: int) -> list[SampledToken]:
            params = SamplingParams(length, temperature=1.0, seed=seed)
            return [token async for token in scheduler.submit(prompt, ROLE, params)]

        return await asyncio.gather(*map(collect, range(count)))

    with Scheduler(policy, max_batch=count, max_model_len=256) as scheduler:
        asyncio.run(sample(scheduler))
        started = time.perf_counter()
        answers = asyncio.run(sample(scheduler))
        seconds = time.perf_counter() - started
    rows = [
        TrainingRow([*prompt, *(token.token_id for token in answer)], [0] * 128 + [1] * len(answer), 1.0)
        for answer in answers
    ]
    with torch.no_grad():
        computed = row_logprobs(policy, ROLE, rows).logprobs.cpu()
    sampled = torch.tensor([[token.logprob for token in answer] for answer in answers])
    distance, limit = float((computed - sampled).abs().mean()), 1e-4 if machine.is_small else 0.05
    yield Result("engine", f"{sum(map(len, answers)) / seconds:.0f} tokens/s, {count} sequences")
    yield Result("sampled against recomputed logprobs", f"{distance:.1e}", f"at most {limit:g}", distance <= limit)


@contextmanager
def group_of_one() -> Iterator[None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    with mock.patch.dict(os.environ, names), process_group():
        yield


def check_sharding(machine: Machine) -> Iterator[Result]:
    rows = make_rows(2, 4, 40, 24)
    base = make_model(TINY, torch.device("cpu"), torch.float32)
    expected = gradient(make_policy(deepcopy(base).to(machine.device)), rows)
    with group_of_one():
        found = gradient(make_policy(base, shards=True), rows)
        yield compare(f"gradient, FSDP with {dist.get_backend()}, one process", found, expected, 1e-4)


def check_quantized(machine: Machine) -> Iterator[Result]:
    if importlib.util.find_spec("bitsandbytes") is None:
        yield Result("QLoRA", "bitsandbytes is not installed")
        return
    rows = make_rows(1, 4, 20, 12, vocabulary=256)
    with tempfile.TemporaryDirectory() as folder:
        build_tiny_model(Path(folder) / "model", ["a text for the tokenizer"], seed=0)
        policies = [make_policy(load_model(Path(folder) / "model", in_4bit=bits)[0]) for bits in (False, True)]
    whole, quantized = (gradient(policy, rows) for policy in policies)
    cosine = float(torch.nn.functional.cosine_similarity(whole, quantized, dim=0))
    yield Result("QLoRA: cosine of the gradient with LoRA's", f"{cosine:.3f}", "at least 0.8", cosine >= 0.8)


def check_resume(machine: Machine) -> Iterator[Result]:
    """A step after a restart is the step without it."""
    rows = make_rows(2, 4, 40, 24)

    def open_training() -> tuple[Policy, torch.optim.Optimizer]:
        policy = make_policy(make_model(TINY, machine.device, torch.float32))
        return policy, torch.optim.AdamW(policy.parameters(ROLE), lr=1e-2)

    def step(policy: Policy, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        optimizer_step(policy, ROLE, optimizer, rows, sft_loss, pack_tokens=None, max_grad_norm=1.0)
        drawn = torch.rand(8, device=machine.device)
        weights = [parameter.detach().flatten() for parameter in policy.parameters(ROLE)]
        return torch.cat([*weights, drawn]).cpu()

    policy, optimizer = open_training()
    step(policy, optimizer)
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(
            Path(folder),
            Checkpoint(
                step=1,
                phase="grpo",
                position=0,
                versions={ROLE: 1},
                adapters={ROLE: policy.adapter(ROLE)},
                adapter_configs={ROLE: policy.adapter_config(ROLE)},
                optimizers={ROLE: optimizer.state_dict()},
                config="",
            ),
        )
        expected = step(policy, optimizer)
        checkpoint = load_latest(Path(folder))
    assert checkpoint is not None
    policy, optimizer = open_training()
    policy.load_adapter(ROLE, checkpoint.adapters[ROLE], 1)
    optimizer.load_state_dict(checkpoint.optimizers[ROLE])
    rng.restore(checkpoint.rng)
    yield compare("step after a restart", step(policy, optimizer), expected, 1e-5)


CHECKS = (
    check_parity,
    check_flex_attention,
    check_sharding,
    check_quantized,
    check_resume,
    check_engine,
    check_speed,
)


def run(machine: Machine) -> Iterator[Result]:
    """The results of all checks; one that raises is a wrong result."""
    started = time.perf_counter()
    for check in CHECKS:
        try:
            yield from check(machine)
        except Exception as error:  # noqa: BLE001 - the other checks go on
            yield Result(check.__name__, f"{type(error).__name__}: {error}".splitlines()[0], "no error", False)
    seconds = time.perf_counter() - started
    yield Result("all checks", f"{seconds:.0f} s", f"at most {MAX_SECONDS} s", seconds <= MAX_SECONDS)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny models only")
    device = best_device()
    machine = Machine(device, parser.parse_args(arguments).small or device.type == "cpu")
    print(f"torch {torch.__version__}, {device}\n\n| check | found | expected | |\n|---|---|---|---|", flush=True)
    is_right = True
    for result in run(machine):
        is_right &= result.is_right
        print(
            f"| {result.check} | {result.found} | {result.expected} | {'' if result.is_right else 'WRONG'} |",
            flush=True,
        )
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
