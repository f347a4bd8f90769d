"""Compares the change that an adapter makes to logprobs in an engine with the one that it makes in the trainer.

Comparing changes cancels the rounding errors that do not depend on the adapter. Those that do remain: in bfloat16 they
are hundreds of times as large as the change of a first step. So how far engine and trainer are apart is measured first,
on the base model, where nothing but rounding differs; a change is compared only if it stands out from that.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from agl.errors import TrainingError

_STANDS_OUT = 8.0
"""Ratio of a change to the rounding errors in it, from which on these hardly affect share and cosine."""
_SHARES, _LOWEST_COSINE = (0.7, 1.4), 0.8
UNUSED = "The engine answers as the base model: the adapter was loaded, but is not used."
_OTHER = "The engine serves another version, another rank or scale, or another base model."


@dataclass(frozen=True, slots=True)
class Verification:
    """Agreement of engine and trainer on what one version of one adapter changes."""

    share: float
    """Least-squares factor from the trainer's changes to the engine's: 1 if the engine serves the adapter, 0 if it
    serves the base model."""
    cosine: float
    """Cosine of the angle between the changes: 1 if they have the same direction."""
    factor: float = 1.0
    """How much the adapter was amplified for the comparison."""


def smallest_change(url: str, engine_base: Tensor, trainer_base: Tensor, tolerance: float) -> float:
    """Root mean square from which on a change of the logprobs [P, K] stands out from rounding errors.

    The K tokens after each of P prompts are the likeliest, in descending order. Raises TrainingError if the logprobs
    of the likeliest differ by more than `tolerance` nats on average: then the base models differ.
    """
    difference = engine_base - trainer_base
    distance = float(difference[:, 0].abs().mean())
    if not distance <= tolerance:
        raise TrainingError(
            f"the logprobs of the base model at {url} are {distance:.4f} nats a token from the trainer's, at most "
            f"{tolerance:g} are allowed (engine.tolerance); does it serve the same base model, in which dtype?"
        )
    return _STANDS_OUT * 2**0.5 * rms(difference)  # a change has the errors of two passes


def rms(values: Tensor) -> float:
    """Root mean square."""
    return float(values.square().mean().sqrt())


def verify(name: str, engine: Tensor, trainer: Tensor, factor: float = 1.0) -> Verification:
    """Compare the changes [P, K] that the adapter `name`, amplified by `factor`, makes in engine and trainer.

    Raises TrainingError if they differ in size or direction; that version must not be made live.
    """
    product = float(torch.vdot(engine.flatten(), trainer.flatten()))
    share = product / float(trainer.square().sum())
    cosine = product / max(float(engine.norm() * trainer.norm()), torch.finfo(torch.float32).tiny)
    if not _SHARES[0] <= share <= _SHARES[1] or cosine < _LOWEST_COSINE:
        raise TrainingError(
            f"{name} is not live: the engine shows {share:.0%} of its change to the logprobs of a test text, with a "
            f"cosine of {cosine:.2f}; expected 100 % and 1. {UNUSED if abs(share) < 1 - _SHARES[0] else _OTHER}"
        )
    return Verification(share, cosine, factor)
