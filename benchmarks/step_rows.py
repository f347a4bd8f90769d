"""What is the same for all who take a measured training step: rows, adapter, and what they say of it."""

import json
import random
import resource
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

VOCABULARY = 49152
"""Of SmolLM2."""


@dataclass(frozen=True, slots=True)
class Shape:
    """`groups` prompts of `prompt` tokens with `rollouts` each: `turns` answers with a tool's words between them."""

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
    """Pieces of tokens, prompt first, then answers and a tool's words in turn; every second one trains."""

    pieces: tuple[list[int], ...]
    advantage: float

    @property
    def token_ids(self) -> list[int]:
        return [token for piece in self.pieces for token in piece]

    @property
    def loss_mask(self) -> list[int]:
        return [number % 2 for number, piece in enumerate(self.pieces) for _ in piece]

    def turns(self) -> Iterator[tuple[list[int], list[int]]]:
        """Each answer with all that stands before it."""
        for number in range(1, len(self.pieces), 2):
            yield [token for piece in self.pieces[:number] for token in piece], self.pieces[number]


def rollouts(shape: Shape) -> list[Rollout]:
    """Random tokens, always the same."""
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
    """Fill the LoRA matrices of `model`, whatever its adapter is called: always with the same numbers."""
    matrices = {
        f"{name.rpartition('lora_A')[0] or name.rpartition('lora_B')[0]}{'A' if 'lora_A' in name else 'B'}": parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
    generator = torch.Generator().manual_seed(0)
    for _, parameter in sorted(matrices.items()):
        torch.nn.init.normal_(parameter, std=0.01, generator=generator)


def sgemm_flops(size: int = 2048, tries: int = 5) -> float:
    """The best that a product of two large float32 matrices reaches here and now, in FLOP/s."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    best = 0.0
    for _ in range(tries):
        started = time.perf_counter()
        torch.mm(left, right)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


@dataclass(frozen=True, slots=True)
class Measured:
    """What a process says of its steps."""

    seconds: list[float]
    cpu_seconds: list[float]
    """Of all threads: what counts where other work ran beside it."""
    grad_norm: float
    sgemm: float
    """FLOP/s."""
    peak_mb: float

    def say(self) -> None:
        print(json.dumps(asdict(self)), flush=True)


def peak_mb() -> float:
    """Of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
