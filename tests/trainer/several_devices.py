"""Training steps of a small policy in the processes that torchrun starts; writes their results to files.

python -m tests.trainer.several_devices FOLDER WAY:PORT...

A way is `plain`, or `fsdp`, `recompute`, `padded`, `failing` joined by hyphens. Its result is FOLDER/DEVICES-WAY.json.
Each has a process group of its own, whose processes meet at its port: at torchrun's they can meet only once.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
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


def policy(options: Sequence[str], model: PreTrainedModel | None = None) -> Policy:
    shards = "fsdp" in options and device_count() > 1
    recomputes, packs = "recompute" in options, "padded" not in options
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


def train(options: Sequence[str]) -> dict[str, object]:
    model = small_model(dtype=torch.float64)
    trained = policy(options, model)
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
        "failure": "" if "fsdp" in options else fail(options),
    }


def fail(options: Sequence[str]) -> str:
    """Error message for a row that only one device gets and rejects; the step after it succeeds."""
    trained = policy(options)
    optimizer = torch.optim.SGD(trained.parameters("writer"), lr=0.1)
    long = rows()[0]
    bad = replace(long, loss_mask=[1, *long.loss_mask[1:]])
    limits = {"pack_tokens": 48, "max_grad_norm": 1.0}
    message = ""
    try:
        optimizer_step(trained, "writer", optimizer, [*rows(), bad], sft_loss, **limits)
    except (TrainingError, ValueError) as error:
        message = str(error)
    optimizer_step(trained, "writer", optimizer, rows(), sft_loss, **limits)
    return message


def main() -> None:
    def lead(way: str, options: Sequence[str]) -> None:
        made = {"failure": fail(options)} if "failing" in options else train(options)
        Path(sys.argv[1], f"{device_count()}-{way}.json").write_text(json.dumps(made))

    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    for argument in sys.argv[2:]:
        way, os.environ["MASTER_PORT"] = argument.split(":")
        options = way.split("-")
        lead_or_follow(partial(lead, way, options), partial(policy, options))


if __name__ == "__main__":
    main()
