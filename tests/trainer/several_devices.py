"""Steps of a small policy, taken by as many processes as torchrun starts; what came of them goes to the file named.

python -m tests.trainer.several_devices RESULT.json
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from agl.errors import TrainingError
from agl_trainer.batch import SampledRow
from agl_trainer.devices import count, lead_or_follow
from agl_trainer.loss_options import LossOptions
from agl_trainer.objective import prepare
from agl_trainer.policy import Policy
from agl_trainer.sft import sft_loss
from agl_trainer.update import update_role
from tests.trainer.small_model import small_model, small_policy

PREFIX = list(range(10, 50))
OPTIONS = LossOptions(beta=0.05, top_entropy_quantile=0.5, vllm_importance_sampling_mode="token_truncate")
"""All that has to be looked up beforehand, in a pass of its own."""


def policy() -> Policy:
    return small_policy(small_model(dtype=torch.float64))


def rows() -> list[SampledRow]:
    """Of different lengths, so that shares are not alike; two are the same."""
    made = []
    for number in range(5):
        answer = [100 + number % 4, *range(number % 4), 7]
        mask = [0] * len(PREFIX) + [1] * len(answer)
        advantage, recorded = [0.3 * number - 0.5] * len(mask), [-2.0] * len(mask)
        made.append(SampledRow([*PREFIX, *answer], mask, 0.05, recorded, advantage))
    return made


def train() -> dict[str, object]:
    trained = policy()
    optimizer = torch.optim.AdamW(trained.parameters("writer"), lr=1e-2)
    losses, norms = [], []
    for number in range(3):
        objective = prepare(trained, "writer", rows(), OPTIONS, pack_tokens=48, moves=number > 0)
        update = update_role(trained, "writer", optimizer, rows(), objective, pack_tokens=48, max_grad_norm=0.5)
        losses.append(update.metrics["loss"])
        norms.append(update.metrics["grad_norm"])
    # Fewer rows than devices: some have nothing to do.
    update = update_role(trained, "writer", optimizer, rows()[:1], sft_loss, pack_tokens=48, max_grad_norm=0.5)
    losses.append(update.metrics["loss"])
    weights = torch.cat([parameter.detach().flatten() for parameter in trained.parameters("writer")])
    return {"devices": count(), "losses": losses, "norms": norms, "weights": weights.tolist(), "failure": failure()}


def failure() -> str:
    """What is said of a row that only one of the devices cannot take; the next step is taken again."""
    trained = policy()
    optimizer = torch.optim.SGD(trained.parameters("writer"), lr=0.1)
    long = rows()[0]
    bad = replace(long, loss_mask=[1, *long.loss_mask[1:]])
    options = {"pack_tokens": 48, "max_grad_norm": 1.0}
    said = ""
    try:
        update_role(trained, "writer", optimizer, [*rows(), bad], sft_loss, **options)
    except (TrainingError, ValueError) as error:
        said = str(error)
    update_role(trained, "writer", optimizer, rows(), sft_loss, **options)
    return said


def main() -> None:
    def lead() -> None:
        Path(sys.argv[1]).write_text(json.dumps(train()))

    lead_or_follow(lead, policy)


if __name__ == "__main__":
    main()
