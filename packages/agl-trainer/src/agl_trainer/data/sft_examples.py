"""Supervised fine-tuning: examples, or rollouts of the store, to training rows, and their loss."""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from agl.config import RoleConfig, SftTracesConfig
from agl.errors import ConfigError
from agl.trajectory import Call, DropReason, Row, Trajectory
from agl_trainer.data.chat import ChatTemplate
from agl_trainer.data.messages import Conversation, describe
from agl_trainer.data.rows import TrainingRow

Example = Mapping[str, Any]
"""`role`, OpenAI-style `messages`, the assistant's `completion`, and optionally `tools`."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """What is learnt from at once: a sequence, and the tokens of it that train (mask 1)."""

    role: str
    token_ids: Sequence[int]
    loss_mask: Sequence[int]
    calls: tuple[Call, ...] = ()
    """Calls that sampled these tokens; an example has none."""


@dataclass(frozen=True, slots=True)
class TraceLimits:
    """What a row of the store must keep to."""

    roles: Mapping[str, RoleConfig]
    max_tokens: int
    vocabulary: int


def example_lesson(template: ChatTemplate, example: Example) -> Lesson:
    return Lesson(example["role"], *example_row(template, example))


def trace_lessons(
    trajectories: Iterable[Trajectory], wanted: SftTracesConfig, limits: TraceLimits
) -> tuple[list[Lesson], list[tuple[Call, DropReason]]]:
    """The rows that `wanted` asks for, and the calls that none of them has, with the reason.

    A row is judged by the last reward on its role, else on the rollout.
    """
    lessons: list[Lesson] = []
    dropped: list[tuple[Call, DropReason]] = []
    for trajectory in trajectories:
        dropped += [(drop.call, drop.reason) for drop in trajectory.drops]
        for row in trajectory.rows:
            reason = DropReason.FAILED_ROLLOUT if trajectory.error else _row_fault(row, wanted, limits)
            calls = tuple(turn.call for turn in row.turns)
            if reason is None:
                lessons.append(Lesson(row.role, row.ids, row.loss_mask, calls))
            else:
                dropped += [(call, reason) for call in calls]
    return lessons, dropped


def _row_fault(row: Row, wanted: SftTracesConfig, limits: TraceLimits) -> DropReason | None:
    role = limits.roles.get(row.role)
    if role is None or (wanted.roles and row.role not in wanted.roles):
        return DropReason.ROLE_NOT_TRAINED
    if (limits.roles[role.adapter] if role.adapter else role).frozen:
        return DropReason.ROLE_FROZEN
    if max(row.ids) >= limits.vocabulary:
        return DropReason.UNKNOWN_TOKENS
    if len(row.ids) > limits.max_tokens:
        return DropReason.TOO_LONG
    if wanted.min_reward is None:
        return None
    if row.reward is None:
        return DropReason.NO_REWARD
    return None if row.reward >= wanted.min_reward else DropReason.REJECTED


def example_row(template: ChatTemplate, example: Example) -> tuple[list[int], list[int]]:
    """Token ids and loss mask of an example, written as the engine writes prompts; it ends with the end of the turn."""
    conversation = _conversation(example)
    prompt = template.prompt_ids(conversation.turns(), conversation.tool_definitions())
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
            _conversation(example)
        except ValidationError as error:
            raise ConfigError(f"sft.examples: {source}: example {index}: {describe(error)}") from error
    return examples


def _conversation(example: Example) -> Conversation:
    """The part of the example that is the prompt. Raises ValidationError."""
    fields = {name: example[name] for name in ("messages", "tools") if example.get(name) is not None}
    return Conversation.model_validate(fields)


def batches(lessons: Sequence[Lesson], batch_size: int, epoch: int, seed: int) -> list[list[Lesson]]:
    """The batches of an epoch: shuffled, each of one role, roles in turn as they come."""
    shuffled = random.Random(f"{seed}-{epoch}").sample(list(lessons), len(lessons))
    by_role: dict[str, list[Lesson]] = {}
    for lesson in shuffled:
        by_role.setdefault(lesson.role, []).append(lesson)
    found = [
        (start / len(own), own[start : start + batch_size])
        for own in by_role.values()
        for start in range(0, len(own), batch_size)
    ]
    return [batch for _, batch in sorted(found, key=lambda item: item[0])]


def sft_rows(batch: Sequence[Lesson]) -> list[TrainingRow]:
    """Rows of a batch, weighted so that the loss is a mean over tokens."""
    tokens = sum(sum(lesson.loss_mask) for lesson in batch)
    return [TrainingRow(lesson.token_ids, lesson.loss_mask, 1 / tokens) for lesson in batch]
