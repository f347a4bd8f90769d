"""Supervised fine-tuning: training rows from examples, or from rollouts of the store."""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from pydantic import ValidationError, model_validator

from agl.config import SftTracesConfig
from agl.errors import ConfigError
from agl.seeds import derive
from agl.trajectory import Call, DropReason, Row, Trajectory
from agl_trainer.data.chat import ChatTemplate, ChatTemplateError
from agl_trainer.data.messages import ApiObject, ChatMessage, Conversation, describe
from agl_trainer.data.rows import TrainingRow

Example = Mapping[str, Any]
"""`role`, OpenAI-style `messages`, the assistant's `completion` as text or message, and optionally `tools`."""


class _Answer(ChatMessage):
    """An assistant's message with something to learn."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.role != "assistant":
            raise ValueError(f"its role is {self.role!r}, expected 'assistant'")
        if self.content is None and not self.tool_calls:
            raise ValueError("the message has neither content nor tool_calls")
        return self


class _Completion(ApiObject):
    completion: _Answer


@dataclass(frozen=True, slots=True)
class SftExample:
    """A token sequence of a role, with the tokens to train on (mask 1)."""

    role: str
    token_ids: Sequence[int]
    loss_mask: Sequence[int]
    calls: tuple[Call, ...] = ()
    """Calls of the store that sampled these tokens."""


@dataclass(frozen=True, slots=True)
class TraceLimits:
    """Limits that rows of a role have to meet."""

    max_tokens: int
    vocabulary_size: int
    is_frozen: bool = False


def examples_from_config(templates: Mapping[str, ChatTemplate], examples: Iterable[Example]) -> list[SftExample]:
    """`templates`: by role. Raises ConfigError for an example that the model's template rejects."""
    made: list[SftExample] = []
    for index, example in enumerate(examples):
        try:
            made.append(SftExample(example["role"], *example_tokens(templates[example["role"]], example)))
        except ChatTemplateError as error:
            raise ConfigError(f"sft.examples: example {index}: {error}") from error
    return made


def examples_from_traces(
    trajectories: Iterable[Trajectory], wanted: SftTracesConfig, limits: Mapping[str, TraceLimits]
) -> tuple[list[SftExample], list[tuple[Call, DropReason]]]:
    """The rows that match `wanted`, and every call that is in none of them, with the reason.

    `limits`: by role, of all roles that train.
    The reward of a row is the last one of its role, else of the rollout.
    """
    examples: list[SftExample] = []
    dropped: list[tuple[Call, DropReason]] = []
    for trajectory in trajectories:
        dropped += [(drop.call, drop.reason) for drop in trajectory.drops]
        for row in trajectory.rows:
            reason = DropReason.FAILED_ROLLOUT if trajectory.error else _drop_reason(row, wanted, limits)
            calls = tuple(turn.call for turn in row.turns)
            if reason is None:
                examples.append(SftExample(row.role, row.ids, row.loss_mask, calls))
            else:
                dropped += [(call, reason) for call in calls]
    return examples, dropped


def _drop_reason(row: Row, wanted: SftTracesConfig, limits: Mapping[str, TraceLimits]) -> DropReason | None:
    limit = limits.get(row.role)
    if limit is None or (wanted.roles and row.role not in wanted.roles):
        return DropReason.ROLE_NOT_TRAINED
    if limit.is_frozen:
        return DropReason.ROLE_FROZEN
    if max(row.ids) >= limit.vocabulary_size:
        return DropReason.UNKNOWN_TOKENS
    if len(row.ids) > limit.max_tokens:
        return DropReason.TOO_LONG
    if wanted.min_reward is None:
        return None
    if row.reward is None:
        return DropReason.NO_REWARD
    return None if row.reward >= wanted.min_reward else DropReason.REJECTED


def example_tokens(template: ChatTemplate, example: Example) -> tuple[list[int], list[int]]:
    """Token ids and loss mask of an example: the prompt as the engine renders it, the completion, the end of turn."""
    conversation = _conversation(example)
    turns, tools, answer = conversation.turns(), conversation.tool_definitions(), _answer(example)
    prompt = template.prompt_ids(turns, tools)
    if isinstance(answer, str):
        end = [template.end_of_turn] if template.end_of_turn is not None else []
        completion = template.encode(answer) + end
    else:
        completion = template.answer_ids(turns, tools, answer.turn())
    return prompt + completion, [0] * len(prompt) + [1] * len(completion)


def check_examples(examples: list[Example], roles: Sequence[str], source: str) -> list[Example]:
    """`examples` of the function `source`. Raises ConfigError for unknown roles, invalid messages or no completion."""
    for index, example in enumerate(examples):
        if not isinstance(example, Mapping):
            kind = type(example).__name__
            raise ConfigError(f"sft.examples: {source}: example {index} is a {kind}, expected a mapping with its role")
        missing = {"role", "messages", "completion"} - set(example)
        if missing:
            raise ConfigError(f"sft.examples: {source}: example {index} lacks {', '.join(sorted(missing))}")
        if example["role"] not in roles:
            known = ", ".join(roles)
            raise ConfigError(f"sft.examples: example {index} has role {example['role']!r}; agent_roles has {known}")
        try:
            _conversation(example)
            _answer(example)
        except ValidationError as error:
            raise ConfigError(f"sft.examples: {source}: example {index}: {describe(error)}") from error
    return examples


def _conversation(example: Example) -> Conversation:
    """Messages and tools of the example. Raises ValidationError."""
    fields = {name: example[name] for name in ("messages", "tools") if example.get(name) is not None}
    return Conversation.model_validate(fields)


def _answer(example: Example) -> str | ChatMessage:
    """The completion: text as the model samples it, or a message, alone or in a list. Raises ValidationError."""
    given = example["completion"]
    if isinstance(given, str):
        return given
    alone = given[0] if isinstance(given, list) and len(given) == 1 else given
    return _Completion.model_validate({"completion": alone}).completion


def epoch_batches(examples: Sequence[SftExample], batch_size: int, epoch: int, seed: int) -> list[list[SftExample]]:
    """The batches of an epoch: shuffled, each of one role; the batches of the roles are interleaved."""
    shuffled = random.Random(derive(seed, "order of examples", epoch)).sample(list(examples), len(examples))
    by_role: dict[str, list[SftExample]] = {}
    for example in shuffled:
        by_role.setdefault(example.role, []).append(example)
    batches = [
        (start / len(own), own[start : start + batch_size])
        for own in by_role.values()
        for start in range(0, len(own), batch_size)
    ]
    return [batch for _, batch in sorted(batches, key=lambda item: item[0])]


def sft_rows(batch: Sequence[SftExample]) -> list[TrainingRow]:
    """Rows of a batch, weighted so that the loss is a mean over its trained tokens."""
    tokens = sum(sum(example.loss_mask) for example in batch)
    return [TrainingRow(example.token_ids, example.loss_mask, 1 / tokens) for example in batch]
