"""The learning rate of each step, as transformers schedules it.

It is a function of the step, so that a resumed training needs no state of a scheduler.
"""

import math

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from agl.config import TrainConfig


def learning_rate(train: TrainConfig, peak: float, step: int, steps: int) -> float:
    """For step `step` (from 0) of a phase of `steps` steps, whose highest learning rate is `peak`."""
    warmup = train.warmup_steps or math.ceil(steps * train.warmup_ratio)
    # Only its factors are used; that of `polynomial` depends on the optimizer's learning rate.
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.empty(0))], lr=peak)
    scheduler = get_scheduler(train.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    assert isinstance(scheduler, LambdaLR)
    (factor,) = scheduler.lr_lambdas
    return peak * factor(step)
