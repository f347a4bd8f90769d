"""Proof that an engine answers with the adapter that the trainer holds.

Both compute the logprobs of one canary prompt, with the adapter and without. What the adapter changes at the engine is
then compared with what it changes at the trainer. By differences, since the two round differently, with and without
the adapter alike.
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
"""Any text does: training by reward moves the logprobs of all."""


@dataclass(frozen=True, slots=True)
class Proof:
    """Of one version of one adapter."""

    share: float
    """Of the trainer's change, how much shows at the engine: 1 where it serves the adapter, 0 where it serves the base
    model. The least-squares factor between the two changes; NaN where the adapter changes nothing yet."""
    distance: float
    """Mean absolute difference between the logprobs of engine and trainer, with the adapter, in nats."""


def prove(name: str, engine: tuple[Tensor, Tensor], trainer: tuple[Tensor, Tensor], tolerance: float) -> Proof:
    """Compare the logprobs [T] of the canary at engine and trainer, each (with the adapter `name`, without).

    Raises TrainingError where less than half or more than one and a half of the trainer's change shows at the engine,
    or the two are further apart than `tolerance`, in nats a token: then that version must not be made live.
    """
    at_engine, at_trainer = engine[0] - engine[1], trainer[0] - trainer[1]
    distance = float((engine[0] - trainer[0]).abs().mean())
    # 0 / 0 before the first update: an adapter that changes nothing cannot be told from the base model.
    share = float(torch.dot(at_engine, at_trainer) / torch.dot(at_trainer, at_trainer))
    if at_trainer.any() and not 0.5 <= share <= 1.5:
        raise TrainingError(
            f"{name} is not live: of its change to the logprobs of the canary {share:.0%} shows at the engine, "
            f"expected 100 %. {_reason(share)}"
        )
    if not distance <= tolerance:
        raise TrainingError(
            f"{name} is not live: the logprobs of engine and trainer are {distance:.4f} nats a token apart, at most "
            f"{tolerance:g} are allowed (engine.tolerance); does the engine serve the same base model, in which dtype?"
        )
    return Proof(share, distance)


def _reason(share: float) -> str:
    if abs(share) < 0.1:
        return "The engine answers as the base model: the adapter was loaded, but is not used."
    return "The engine serves another version, another rank or scale, or another base model."
