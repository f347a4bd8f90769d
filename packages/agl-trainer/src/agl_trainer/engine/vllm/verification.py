"""Verifies that an engine serves the adapter that the trainer has.

Engine and trainer each compute the logprobs of a canary prompt with and without the adapter, and the differences that
the adapter makes are compared. Comparing differences cancels the rounding errors in which the two differ, which are the
same with and without the adapter.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from agl.errors import TrainingError

CANARY = (
    "SELECT customers.name, COUNT(orders.id) AS number FROM customers JOIN orders ON orders.customer_id = customers.id "
    "WHERE orders.total > 100 GROUP BY customers.name ORDER BY number DESC LIMIT 10; The planner reads the question, "
    "thinks about which tables answer it, writes down the steps and hands them to the executor, who says what came."
)
"""Any text works: training changes the logprobs of every text."""


@dataclass(frozen=True, slots=True)
class Verification:
    """Agreement of engine and trainer on one version of one adapter."""

    share: float
    """Least-squares factor from the trainer's differences to the engine's: 1 if the engine serves the adapter, 0 if it
    serves the base model, NaN if the adapter changes nothing yet."""
    distance: float
    """Mean absolute difference of the logprobs of engine and trainer, with the adapter, in nats."""


def verify(name: str, engine: tuple[Tensor, Tensor], trainer: tuple[Tensor, Tensor], tolerance: float) -> Verification:
    """Compare the canary's logprobs [T] of engine and trainer, each as (with adapter `name`, without adapter).

    Raises TrainingError if the share is below 0.5 or above 1.5, or the distance exceeds `tolerance` (nats per token);
    that version must not be made live.
    """
    engine_change, trainer_change = engine[0] - engine[1], trainer[0] - trainer[1]
    distance = float((engine[0] - trainer[0]).abs().mean())
    # 0 / 0 before the first update, when the adapter does not change any logprob.
    share = float(torch.dot(engine_change, trainer_change) / torch.dot(trainer_change, trainer_change))
    if trainer_change.any() and not 0.5 <= share <= 1.5:
        raise TrainingError(
            f"{name} is not live: the engine shows {share:.0%} of its change to the logprobs of the canary, "
            f"expected 100 %. {_reason(share)}"
        )
    if not distance <= tolerance:
        raise TrainingError(
            f"{name} is not live: the logprobs of engine and trainer are {distance:.4f} nats a token apart, at most "
            f"{tolerance:g} are allowed (engine.tolerance); does the engine serve the same base model, in which dtype?"
        )
    return Verification(share, distance)


def _reason(share: float) -> str:
    if abs(share) < 0.1:
        return "The engine answers as the base model: the adapter was loaded, but is not used."
    return "The engine serves another version, another rank or scale, or another base model."
