"""Learning rate, decay and moments are those of a training with transformers' scheduler and torch's AdamW."""

from typing import Any, get_args

import pytest
import torch
from transformers import get_scheduler

from agl.config import Config, TrainConfig
from agl.config.train import Scheduler
from agl.errors import ConfigError
from agl_trainer.loop.schedule import learning_rate
from agl_trainer.loop.state import GRPO, TrainingState
from agl_trainer.model.policies import Policies
from tests.trainer.small_model import small_policy

STEPS = 7


def train_config(**options: Any) -> TrainConfig:
    return Config.parse({"train": {"model": "tiny", "steps": STEPS, **options}}).require_train()


@pytest.mark.parametrize("name", get_args(Scheduler))
@pytest.mark.parametrize("warmup", [{}, {"warmup_steps": 3}, {"warmup_ratio": 0.3}], ids=str)
def test_a_schedule_is_that_of_transformers(name: str, warmup: dict[str, float]) -> None:
    """Steps of an optimizer that transformers' scheduler drives; 0.3 of 7 steps are 3."""
    if name == "constant" and warmup:
        with pytest.raises(ConfigError, match="choose constant_with_warmup"):
            train_config(lr_scheduler_type=name, **warmup)
        return
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=0.02)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=3 if warmup else 0, num_training_steps=STEPS)
    expected = []
    for _ in range(STEPS):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    train = train_config(lr_scheduler_type=name, **warmup)
    assert [learning_rate(train, 0.02, step, STEPS) for step in range(STEPS)] == expected


def test_a_worked_schedule() -> None:
    """Two steps of warm-up, then a straight line to 0 at step 7."""
    train = train_config(lr_scheduler_type="linear", warmup_steps=2)
    rates = [learning_rate(train, 1.0, step, STEPS) for step in range(STEPS)]
    assert rates == pytest.approx([0, 0.5, 1, 0.8, 0.6, 0.4, 0.2])


def test_two_kinds_of_warmup_are_refused() -> None:
    with pytest.raises(ConfigError, match="warmup_steps and warmup_ratio exclude each other"):
        train_config(lr_scheduler_type="linear", warmup_steps=2, warmup_ratio=0.1)


def test_an_adapter_moves_as_by_adamw_with_the_configured_options() -> None:
    """Also after the options changed: those of the configuration hold, not those that an optimizer was saved with."""
    policy, state = small_policy(), TrainingState()
    mine = policy.parameters("writer")
    copies = [torch.nn.Parameter(parameter.detach().clone()) for parameter in mine]
    plain = torch.optim.AdamW(copies, lr=0.0, betas=(0.7, 0.95), weight_decay=0.1)
    first = train_config(weight_decay=0.1, adam_beta1=0.7, adam_beta2=0.95, lr_scheduler_type="cosine")
    second = train_config(weight_decay=0.3, adam_beta1=0.7, adam_beta2=0.9, lr_scheduler_type="linear")
    for step in range(STEPS):
        train = first if step < 4 else second
        state.enter(GRPO, Policies([policy]), train)
        state.set_learning_rate(rate := learning_rate(train, 0.02, step, STEPS))
        plain.param_groups[0] |= {"lr": rate, "weight_decay": 0.1 if step < 4 else 0.3}
        plain.param_groups[0]["betas"] = (0.7, 0.95 if step < 4 else 0.9)
        for parameter, copy in zip(mine, copies, strict=True):
            parameter.grad = torch.randn_like(parameter)
            copy.grad = parameter.grad.clone()
        state.optimizers["writer"].step()
        plain.step()
    assert all(torch.equal(parameter, copy) for parameter, copy in zip(mine, copies, strict=True))
