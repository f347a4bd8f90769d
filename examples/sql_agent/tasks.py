"""Training tasks, held-out tasks, and gold traces for supervised training.

A task is `{"id", "question", "gold"}`. The id names its combination: `family/column=value/.../detail`. The combinations
of each family are split once. Held-out combinations never occur in training, but each of their words does, in different
combinations.
"""

import random
import re
import zlib
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Any

from examples.sql_agent.database import failure
from examples.sql_agent.prompts import fixer_messages, writer_messages
from examples.sql_agent.templates import FAMILIES, TINY_FAMILIES, Combination

Task = dict[str, str]
Example = dict[str, Any]

HELD_OUT, SHOWN, TRAIN = 8, 4, 24
"""Tasks of each family for evaluation, for SFT (shown with their answers) and for GRPO (fewer in a small family)."""
WRITER_EXAMPLES = 36
"""Number of shown tasks, from the first, that become examples of the writer. The rest are examples of the fixer."""
TINY_HELD_OUT, TINY_SHOWN, TINY_TRAIN = 22, 24, 40
TINY_WRITER_EXAMPLES = 64


def train_tasks() -> list[Task]:
    """Tasks for GRPO, alternating between families. None of them is shown in SFT, where its answer would be learned."""
    return _take_turns([family[HELD_OUT + SHOWN :][:TRAIN] for family in _full()])


def eval_tasks() -> list[Task]:
    """The held-out tasks, equally many of each family."""
    return _take_turns([family[:HELD_OUT] for family in _full()])


def gold_examples() -> list[Example]:
    """Gold traces of both roles, built from the shown tasks."""
    return _examples(_take_turns([family[HELD_OUT:][:SHOWN] for family in _full()]), WRITER_EXAMPLES)


def tiny_train_tasks() -> list[Task]:
    """Tasks for GRPO with a small vocabulary, for a model with random weights."""
    return _take_turns([family[TINY_HELD_OUT + TINY_SHOWN :][:TINY_TRAIN] for family in _tiny()])


def tiny_eval_tasks() -> list[Task]:
    """The held-out tasks with a small vocabulary."""
    return _take_turns([family[:TINY_HELD_OUT] for family in _tiny()])


def tiny_gold_examples() -> list[Example]:
    """Traces of both roles with a small vocabulary. All queries are right, but three of four scan the whole table."""
    examples = _examples(_take_turns([family[TINY_HELD_OUT:][:TINY_SHOWN] for family in _tiny()]), TINY_WRITER_EXAMPLES)
    return [_without_index(example) if number % 4 else example for number, example in enumerate(examples)]


def _without_index(example: Example) -> Example:
    """A sign before the column keeps SQLite from looking its value up in the index."""
    return example | {"completion": example["completion"].replace("WHERE ", "WHERE +")}


def break_query(gold: str, turn: int) -> str:
    """A wrong version of `gold` that fails or finds no rows. `turn` selects one of the typical mistakes."""
    mistakes = _MISTAKES[turn % len(_MISTAKES) :] + _MISTAKES
    return next(broken for mistake in mistakes if (broken := mistake(gold)) != gold and failure(broken))


_MISTAKES: tuple[Callable[[str], str], ...] = (
    lambda sql: re.sub(r"\bFROM (\w+)s\b", r"FROM \1", sql),  # a table that does not exist
    lambda sql: re.sub(r"'(\w+)'", r"\1", sql, count=1),  # a value without quotes
    lambda sql: re.sub(r" JOIN .*(?= WHERE)", "", sql),  # a join left out
    lambda sql: re.sub(r"'(\w+)'", lambda value: value.group().lower(), sql),  # a value that does not occur
    lambda sql: re.sub(r"WHERE (\w+)", r"WHERE \1s", sql),  # a column that does not exist
)


def _full() -> list[list[Task]]:
    return [_tasks(family) for family in FAMILIES]


def _tiny() -> list[list[Task]]:
    """Tasks on products only, which halves the vocabulary."""
    return [_tasks(family) for family in TINY_FAMILIES]


def _tasks(family: Callable[[], Iterator[Combination]]) -> list[Task]:
    """The family's combinations as tasks, in a fixed random order."""
    tasks = [_task(family.__name__, item) for item in family()]
    return random.Random(family.__name__).sample(tasks, len(tasks))


def _task(family: str, item: Combination) -> Task:
    """The combination with one of its questions, selected by its id."""
    name = f"{family}/{item.id}"
    question = item.questions[zlib.crc32(name.encode()) % len(item.questions)]
    return {"id": name, "question": question, "gold": item.gold}


def _take_turns(families: list[list[Task]]) -> list[Task]:
    return [task for turn in zip_longest(*families) for task in turn if task]


def _examples(tasks: list[Task], writers: int) -> list[Example]:
    """Examples of the writer from the first `writers` tasks, and of the fixer from the rest."""
    mended = (_fixer_example(task, turn) for turn, task in enumerate(tasks[writers:]))
    return [*map(_writer_example, tasks[:writers]), *mended]


def _writer_example(task: Task) -> Example:
    return {"role": "writer", "messages": writer_messages(task["question"]), "completion": task["gold"]}


def _fixer_example(task: Task, turn: int) -> Example:
    broken = break_query(task["gold"], turn)
    messages = fixer_messages(task["question"], broken, failure(broken) or "")
    return {"role": "fixer", "messages": messages, "completion": task["gold"]}
