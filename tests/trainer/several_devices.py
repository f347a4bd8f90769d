"""Training steps of a small policy in the processes that torchrun starts; writes their results to a file.

python -m tests.trainer.several_devices RESULT.json [fsdp] [recompute] [padded] [failing]
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from agl.config import PolicyLossConfig
from agl.errors import TrainingError
from agl_trainer.algo.sft_loss import sft_loss
from agl_trainer.compute.devices import device_count, lead_or_follow
from agl_trainer.compute.optimizer_step import optimizer_step
from agl_trainer.compute.train_batch import prepare_objective
from agl_trainer.data.rows import SampledRow
from agl_trainer.model.policy import Policy
from tests.trainer.small_model import small_model, small_policy

PREFIX = list(range(10, 50))
OPTIONS = PolicyLossConfig(beta=0.05, top_entropy_quantile=0.5, importance_sampling_mode="token_truncate")
"""Needs the reference, the entropies and the initial logprobs, each from forward passes of its own."""


def policy(model: PreTrainedModel | None = None) -> Policy:
    shards = "fsdp" in sys.argv and device_count() > 1
    recomputes, packs = "recompute" in sys.argv, "padded" not in sys.argv
    model = model or small_model(dtype=torch.float64)
    return small_policy(model, packs=packs, recomputes=recomputes, shards=shards)


def rows() -> list[SampledRow]:
    """Rows of different lengths, so that the shares of devices differ. Two are equal, one shares no prefix and is long,
    one ends inside a prefix of others."""
    answers = [[100 + number % 4, *range(number % 4), 7] for number in range(5)]
    given = [*((PREFIX, answer) for answer in answers), (PREFIX[:38], PREFIX[38:]), ([8], list(range(60, 130)))]
    made = []
    for number, (prompt, answer) in enumerate(given):
        mask = [0] * len(prompt) + [1] * len(answer)
        advantage, recorded = [0.3 * number - 0.5] * len(mask), [-2.0] * len(mask)
        made.append(SampledRow([*prompt, *answer], mask, 0.05, recorded, advantage))
    return made


def train() -> dict[str, object]:
    model = small_model(dtype=torch.float64)
    trained = policy(model)
    optimizer = torch.optim.AdamW(trained.parameters("writer"), lr=1e-2)
    losses, norms = [], []
    for number in range(3):
        objective = prepare_objective(trained, "writer", rows(), OPTIONS, pack_tokens=48, is_first=number == 0)
        update = optimizer_step(trained, "writer", optimizer, rows(), objective, pack_tokens=48, max_grad_norm=0.5)
        losses.append(update.metrics["loss"])
        norms.append(update.metrics["grad_norm"])
    # Fewer rows than devices.
    update = optimizer_step(trained, "writer", optimizer, rows()[:1], sft_loss, pack_tokens=48, max_grad_norm=0.5)
    losses.append(update.metrics["loss"])
    weights = torch.cat([parameter.detach().flatten() for parameter in trained.parameters("writer")])
    return {
        "devices": device_count(),
        "sharded": sorted(name for name, value in model.named_parameters() if isinstance(value, DTensor)),
        "losses": losses,
        "norms": norms,
        "weights": weights.tolist(),
        "failure": "" if "fsdp" in sys.argv else fail(),
    }


def fail() -> str:
    """Error message for a row that only one device gets and rejects; the step after it succeeds."""
    trained = policy()
    optimizer = torch.optim.SGD(trained.parameters("writer"), lr=0.1)
    long = rows()[0]
    bad = replace(long, loss_mask=[1, *long.loss_mask[1:]])
    options = {"pack_tokens": 48, "max_grad_norm": 1.0}
    message = ""
    try:
        optimizer_step(trained, "writer", optimizer, [*rows(), bad], sft_loss, **options)
    except (TrainingError, ValueError) as error:
        message = str(error)
    optimizer_step(trained, "writer", optimizer, rows(), sft_loss, **options)
    return message


def main() -> None:
    def lead() -> None:
        Path(sys.argv[1]).write_text(json.dumps({"failure": fail()} if "failing" in sys.argv else train()))

    lead_or_follow(lead, policy)


if __name__ == "__main__":
    main()
