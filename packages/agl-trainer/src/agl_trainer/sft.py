"""Supervised fine-tuning: examples to training rows, and their loss."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from agl.errors import ConfigError
from agl_trainer.batch import TrainingRow
from agl_trainer.engine.chat import ChatTemplate
from agl_trainer.engine.schema import ChatRequest, RequestError, parse_request
from agl_trainer.logprobs import RowLogprobs

Example = Mapping[str, Any]
"""`role`, OpenAI-style `messages`, the assistant's `completion`, and optionally `tools`."""


def example_row(template: ChatTemplate, example: Example) -> tuple[list[int], list[int]]:
    """Token ids and loss mask of an example, written as the engine writes prompts; it ends with the end of the turn."""
    asked = _request(example)
    prompt = template.prompt_ids([message.turn() for message in asked.messages], asked.offered_tools)
    end = [template.end_of_turn] if template.end_of_turn is not None else []
    answer = template.encode(example["completion"]) + end
    return prompt + answer, [0] * len(prompt) + [1] * len(answer)


def check_examples(examples: list[Example], roles: Sequence[str], source: str) -> list[Example]:
    """`examples`, if each has a known role, messages and a completion. Raises ConfigError naming the first bad one."""
    for index, example in enumerate(examples):
        missing = {"role", "messages", "completion"} - set(example)
        if missing:
            raise ConfigError(f"sft.examples: {source}: example {index} lacks {', '.join(sorted(missing))}")
        if example["role"] not in roles:
            known = ", ".join(roles)
            raise ConfigError(f"sft.examples: example {index} has role {example['role']!r}; agent_roles has {known}")
        try:
            _request(example)
        except RequestError as error:
            raise ConfigError(f"sft.examples: {source}: example {index}: {error}") from error
    return examples


def _request(example: Example) -> ChatRequest:
    """The request that the engine would have answered with the completion. Raises RequestError."""
    return parse_request(ChatRequest, {"messages": example["messages"], "tools": example.get("tools")})


def batches(examples: Sequence[Example], batch_size: int, epoch: int, seed: int) -> list[list[Example]]:
    """The batches of an epoch: shuffled, each of one role, roles in turn as they come."""
    shuffled = random.Random(f"{seed}-{epoch}").sample(list(examples), len(examples))
    by_role: dict[str, list[Example]] = {}
    for example in shuffled:
        by_role.setdefault(example["role"], []).append(example)
    found = [
        (start / len(own), own[start : start + batch_size])
        for own in by_role.values()
        for start in range(0, len(own), batch_size)
    ]
    return [batch for _, batch in sorted(found, key=lambda item: item[0])]


def sft_rows(template: ChatTemplate, batch: Sequence[Example]) -> list[TrainingRow]:
    """Rows of a batch, weighted so that the loss is a mean over tokens."""
    rows = [example_row(template, example) for example in batch]
    tokens = sum(sum(mask) for _, mask in rows)
    return [TrainingRow(ids, mask, 1 / tokens) for ids, mask in rows]


def sft_loss(result: RowLogprobs, rows: Sequence[TrainingRow]) -> tuple[Tensor, dict[str, float]]:
    """Negative log-likelihood of the trained tokens, times the weights of their rows."""
    weights = torch.tensor([row.weight for row in rows])[:, None]
    return -(result.logprobs * weights).sum(), {}
