"""Inputs and outputs shared by all measured training steps: rows, initial adapter and the reported measurements."""

import json
import random
import resource
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

VOCABULARY = 49152
"""Size of SmolLM2's vocabulary."""


@dataclass(frozen=True, slots=True)
class Shape:
    """`groups` prompts of `prompt` tokens, `rollouts` rollouts of each.

    A rollout has `turns` answers of `answer` tokens, with `tool` tokens of a tool's result between two answers.
    """

    name: str
    groups: int
    rollouts: int
    prompt: int
    answer: int
    turns: int = 1
    tool: int = 0


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("a", groups=1, rollouts=8, prompt=512, answer=48),
        Shape("b", groups=1, rollouts=8, prompt=512, answer=48, turns=4, tool=64),
        Shape("c", groups=8, rollouts=1, prompt=64, answer=128),
    )
}


@dataclass(frozen=True, slots=True)
class Rollout:
    """Token pieces: the prompt, then answers and tool results in turn. Every second piece, an answer, trains."""

    pieces: tuple[list[int], ...]
    advantage: float

    @property
    def token_ids(self) -> list[int]:
        return [token for piece in self.pieces for token in piece]

    @property
    def loss_mask(self) -> list[int]:
        return [number % 2 for number, piece in enumerate(self.pieces) for _ in piece]

    def turns(self) -> Iterator[tuple[list[int], list[int]]]:
        """Each answer, preceded by all tokens before it: pairs (prompt, answer)."""
        for number in range(1, len(self.pieces), 2):
            yield [token for piece in self.pieces[:number] for token in piece], self.pieces[number]


def rollouts(shape: Shape) -> list[Rollout]:
    """Rollouts with random tokens, the same on each call."""
    draw = random.Random(shape.name)
    made = []
    for _ in range(shape.groups):
        prompt = draw.choices(range(VOCABULARY), k=shape.prompt)
        for _ in range(shape.rollouts):
            pieces = [prompt]
            for turn in range(shape.turns):
                pieces += [draw.choices(range(VOCABULARY), k=shape.tool)] if turn else []
                pieces += [draw.choices(range(VOCABULARY), k=shape.answer)]
            made.append(Rollout(tuple(pieces), draw.gauss(0, 1)))
    return made


def draw_adapter(model: torch.nn.Module) -> None:
    """Fill the LoRA matrices of `model` with the same random numbers on each call, for any adapter name."""
    matrices = {
        f"{name.rpartition('lora_A')[0] or name.rpartition('lora_B')[0]}{'A' if 'lora_A' in name else 'B'}": parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
    generator = torch.Generator().manual_seed(0)
    for _, parameter in sorted(matrices.items()):
        torch.nn.init.normal_(parameter, std=0.01, generator=generator)


def sgemm_flops(size: int = 2048, tries: int = 5) -> float:
    """Highest rate in FLOP/s of a product of two large float32 matrices, measured now in this process."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    best = 0.0
    for _ in range(tries):
        started = time.perf_counter()
        torch.mm(left, right)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


@dataclass(frozen=True, slots=True)
class Measured:
    """Measurements that a process reports of its steps."""

    seconds: list[float]
    cpu_seconds: list[float]
    """CPU time of all threads, which depends less on other work on the machine than `seconds`."""
    grad_norm: float
    sgemm: float
    """FLOP/s."""
    peak_mb: float

    def print_json(self) -> None:
        print(json.dumps(asdict(self)), flush=True)


def peak_mb() -> float:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
