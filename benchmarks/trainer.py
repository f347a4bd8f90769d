"""Time, peak memory and achieved FLOP/s of a training step, ours and TRL's GRPOTrainer. Prints Markdown.

.venv/bin/python -m benchmarks.trainer a b c
.venv/bin/python -m benchmarks.trainer a --compile

A step is forward, loss, backward and optimizer over the same rows with the same LoRA matrices (rank 16 on all linear
layers of SmolLM2-135M, float32). Each variant runs in a separate process, one after another, so its peak memory is that
of the process, model included. Equal gradient norms show that all variants compute the same gradient.

- a: 8 rollouts of one 512-token prompt, 48 tokens each
- b: as a, with 4 answers each and 64 tokens of tool result between two answers. TRL has one row per answer, 4 rows per
  batch, all padded to the same length; one of its eight batches is measured
- c: 8 different prompts of 64 tokens, 128 tokens each; no prefix is shared

--compile measures our packed step with and without `train.compile`, in turn in one process.
"""

import agl_trainer  # noqa: F401  # before torch, which reads how long an idle thread spins

# isort: split
import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

from agl.config import PolicyLossConfig, RoleConfig
from agl_trainer.algo.objective import Objective
from agl_trainer.compute.logprobs import row_logprobs
from agl_trainer.compute.optimizer_step import optimizer_step
from agl_trainer.data.prefix_tree import pack_rows
from agl_trainer.data.rows import SampledRow, TrainingRow
from agl_trainer.model.base_model import load_model
from agl_trainer.model.model_folder import model_folder
from agl_trainer.model.policy import Policy
from benchmarks.step_rows import SHAPES, Measured, Shape, draw_adapter, peak_mb, rollouts, sgemm_flops
from tests.venv import python_with

TRL = "1.16.0"
_ROLE = "writer"


@dataclass(frozen=True, slots=True)
class Way:
    """A variant of the step: packed rows, padded rows, or TRL with batches of `trl_rows` rows.

    `tokens`: `train.pack_tokens`. `recomputes`: with `train.gradient_checkpointing`.
    """

    name: str
    tokens: int | None = None
    is_padded: bool = False
    recomputes: bool = False
    trl_rows: int = 0
    trl_batches: int = 1
    """Number of TRL's batches that are measured. The time is extrapolated to all batches of the step."""

    def measure(self, shape: str, rounds: int) -> Measured:
        if self.trl_rows:
            python, module = python_with("trl", f"trl=={TRL}"), "benchmarks.trl_step"
            arguments = [shape, str(model_folder("smollm2")), str(self.trl_rows), str(rounds), str(self.trl_batches)]
        else:
            python, module = Path(sys.executable), "benchmarks.trainer"
            arguments = ["--measure", self.name, "--rounds", str(rounds), shape]
        output = subprocess.run([python, "-m", module, *arguments], check=True, stdout=subprocess.PIPE, text=True)
        return Measured(**json.loads(output.stdout.splitlines()[-1]))


WAYS = {
    "a": [
        Way("agl, packed"),
        Way("agl, packed, recomputed", recomputes=True),
        Way("agl, padded rows", is_padded=True),
        Way(f"TRL {TRL}", trl_rows=8),
    ],
    "b": [
        Way("agl, packed"),
        Way("agl, packed, 4096 tokens at once", tokens=4096),
        Way("agl, packed, 2048 tokens at once", tokens=2048),
        Way("agl, packed, 1024 tokens at once", tokens=1024),
        Way("agl, packed, recomputed", recomputes=True),
        Way(f"TRL {TRL}, one of 8 batches, times 8", trl_rows=4),
    ],
    "c": [Way("agl, packed"), Way("agl, padded rows", is_padded=True), Way(f"TRL {TRL}", trl_rows=8)],
}


@dataclass(frozen=True, slots=True)
class _Step:
    seconds: float
    cpu_seconds: float
    grad_norm: float


def _stepper(shape: Shape, way: Way, *, compiles: bool = False) -> Callable[[int], _Step]:
    """Returns a function that takes our step in this process, over the rows from a given index on.

    Every step starts from the same adapter.
    """
    torch.set_num_threads(2)
    model, tokenizer = load_model(model_folder("smollm2"))
    policy = Policy(
        model,
        tokenizer,
        {_ROLE: RoleConfig()},
        base_name="smollm2",
        seed=0,
        packs=not way.is_padded,
        recomputes=way.recomputes,
        compiles=compiles,
    )
    optimizer = torch.optim.AdamW(policy.parameters(_ROLE), lr=2e-4, weight_decay=0.0)
    draw_adapter(model)
    rows, objective = _rows(shape, policy), Objective(PolicyLossConfig(epsilon=1e9))

    def take(first: int) -> _Step:
        draw_adapter(model)
        started, cpu_started = time.perf_counter(), time.process_time()
        update = optimizer_step(
            policy, _ROLE, optimizer, rows[first:], objective, pack_tokens=way.tokens, max_grad_norm=1
        )
        return _Step(time.perf_counter() - started, time.process_time() - cpu_started, update.metrics["grad_norm"])

    return take


def measure(shape: Shape, way: Way, rounds: int) -> Measured:
    """Measure our step in this process."""
    take, sgemm = _stepper(shape, way), sgemm_flops()
    take(0)  # warms up
    steps = [take(0) for _ in range(rounds)]
    seconds, cpu_seconds = [step.seconds for step in steps], [step.cpu_seconds for step in steps]
    return Measured(seconds, cpu_seconds, steps[-1].grad_norm, sgemm, peak_mb())


def compare_compiled(shape: str, rounds: int) -> None:
    """Measure our packed step with and without `train.compile`, in turn in this process, and print the table."""
    steppers = [_stepper(SHAPES[shape], WAYS[shape][0], compiles=compiles) for compiles in (False, True)]
    # Training uses code for any number of tokens, which torch compiles when it meets the second number.
    firsts = [take(1).seconds + take(0).seconds for take in steppers]
    turns = list(zip(*([take(0) for take in steppers] for _ in range(rounds)), strict=True))
    print("| rows | train.compile | first two steps s | s a step | lowest to highest | CPU s | gradient |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for setting, first, steps in zip(("false", "true"), firsts, turns, strict=True):
        seconds = sorted(step.seconds for step in steps)
        cells = [
            shape,
            setting,
            f"{first:.2f}",
            f"{median(seconds):.2f}",
            f"{seconds[0]:.2f} to {seconds[-1]:.2f}",
            f"{median(step.cpu_seconds for step in steps):.1f}",
            f"{steps[-1].grad_norm:.5f}",
        ]
        print(f"| {' | '.join(cells)} |")


def _rows(shape: Shape, policy: Policy) -> list[SampledRow]:
    """On-policy rows, as TRL assumes: the probability ratio to the recorded logprobs is 1."""
    made = rollouts(shape)
    rows = [TrainingRow(of.token_ids, of.loss_mask, 1 / (sum(of.loss_mask) * len(made))) for of in made]
    with torch.no_grad():
        logprobs = row_logprobs(policy, _ROLE, rows).logprobs.tolist()
    sampled = []
    for rollout, row, values in zip(made, rows, logprobs, strict=True):
        of_token = iter(values)
        recorded = [next(of_token) if counts else 0.0 for counts in row.loss_mask]
        advantages = [rollout.advantage] * len(row.token_ids)
        sampled.append(SampledRow(row.token_ids, row.loss_mask, row.weight, recorded, advantages))
    return sampled


def needed_flops(shape: Shape) -> float:
    """Minimum FLOPs of a step in which each distinct token is computed once.

    The base model: forward, and backward to its inputs. LoRA: also backward to its weights. The output layer: forward
    and backward for the trained tokens only.
    """
    hidden, inner, heads, layers, rank, vocabulary = 576, 1536, 576 + 2 * 192, 30, 16, 49152
    ends = [(hidden, heads), (hidden, hidden), (hidden, 2 * inner), (inner, hidden)]
    base = sum(width * out for width, out in ends) * layers
    lora = sum(rank * (width + out) for width, out in [*ends[1:2], *ends[3:]]) * layers
    lora += rank * (3 * hidden + heads + 2 * hidden + 2 * inner) * layers
    made = rollouts(shape)
    tokens = len(pack_rows([rollout.token_ids for rollout in made]).token_ids)
    trained = sum(sum(rollout.loss_mask) for rollout in made)
    return 4 * base * tokens + 6 * lora * tokens + 4 * hidden * vocabulary * trained


def table(shape: str, rounds: int) -> None:
    print("| rows | way | s a step | of TRL | CPU s | of TRL | peak GB | of TRL | FLOP/s of sgemm | gradient |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    found = [(way, way.measure(shape, rounds)) for way in reversed(WAYS[shape])]
    base = next(measured for way, measured in found if way.trl_rows)
    for way, measured in reversed(found):
        print(_line(shape, way, measured, base), flush=True)


def _line(shape: str, way: Way, measured: Measured, base: Measured) -> str:
    seconds = median(measured.seconds)
    achieved = needed_flops(SHAPES[shape]) / seconds / measured.sgemm
    cells = [
        shape,
        way.name,
        f"{seconds:.2f}",
        f"1/{median(base.seconds) / seconds:.1f}",
        f"{median(measured.cpu_seconds):.1f}",
        f"1/{median(base.cpu_seconds) / median(measured.cpu_seconds):.1f}",
        f"{measured.peak_mb / 1024:.2f}",
        f"1/{base.peak_mb / measured.peak_mb:.1f}",
        f"{achieved:.0%} of {measured.sgemm / 1e9:.0f} G",
        "" if math.isnan(measured.grad_norm) else f"{measured.grad_norm:.5f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="+", choices=sorted(SHAPES))
    parser.add_argument("--rounds", type=int, default=3, help="number of measured steps; the table has their median")
    parser.add_argument("--compile", action="store_true", help="measure our step with and without train.compile")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        way = next(way for way in WAYS[arguments.shapes[0]] if way.name == arguments.measure)
        measure(SHAPES[arguments.shapes[0]], way, arguments.rounds).print_json()
        return
    _print_versions()
    for shape in arguments.shapes:
        (compare_compiled if arguments.compile else table)(shape, arguments.rounds)


def _print_versions() -> None:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    print(f"{versions}, TRL {TRL}\n", flush=True)


if __name__ == "__main__":
    main()
