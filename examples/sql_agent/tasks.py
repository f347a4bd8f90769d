"""Training and held-out tasks, and the gold traces that supervised training starts from.

A task is `{"id", "question", "gold"}`; the id names its combination, `family/column=value/.../detail`. Each family's
combinations are split once: those held out never occur in training, while each of their words does, elsewhere.
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
"""Tasks of each family: held out, shown with their answers, reinforced; a small family reinforces what it has left."""
WRITER_EXAMPLES = 36
"""Of the shown tasks, in their order; the others show the fixer's part."""
TINY_HELD_OUT, TINY_SHOWN, TINY_TRAIN = 16, 12, 40
TINY_WRITER_EXAMPLES = 36


def train_tasks() -> list[Task]:
    """The tasks to reinforce, the families taking turns. None is among the shown ones: their answers are known."""
    return _take_turns([family[HELD_OUT + SHOWN :][:TRAIN] for family in _full()])


def eval_tasks() -> list[Task]:
    """The held-out tasks, as many of each family."""
    return _take_turns([family[:HELD_OUT] for family in _full()])


def gold_examples() -> list[Example]:
    """Gold traces of both roles, made from the shown tasks."""
    return _examples(_take_turns([family[HELD_OUT:][:SHOWN] for family in _full()]), WRITER_EXAMPLES)


def tiny_train_tasks() -> list[Task]:
    """The tasks to reinforce in few words, for a model that starts from nothing."""
    return _take_turns([family[TINY_HELD_OUT + TINY_SHOWN :][:TINY_TRAIN] for family in _tiny()])


def tiny_eval_tasks() -> list[Task]:
    """The held-out tasks in few words."""
    return _take_turns([family[:TINY_HELD_OUT] for family in _tiny()])


def tiny_gold_examples() -> list[Example]:
    """Gold traces of both roles in few words."""
    return _examples(_take_turns([family[TINY_HELD_OUT:][:TINY_SHOWN] for family in _tiny()]), TINY_WRITER_EXAMPLES)


def break_query(gold: str, turn: int) -> str:
    """A wrong version of `gold` that fails or finds nothing; `turn` picks among the usual mistakes."""
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
    """Of orders and products only: half the words to know."""
    return [[task for task in _tasks(family) if "customers" not in task["gold"]] for family in TINY_FAMILIES]


def _tasks(family: Callable[[], Iterator[Combination]]) -> list[Task]:
    """The family's combinations as tasks, in a random order that is always the same."""
    tasks = [_task(family.__name__, item) for item in family()]
    return random.Random(family.__name__).sample(tasks, len(tasks))


def _task(family: str, item: Combination) -> Task:
    """The combination with one of its questions, picked by its id."""
    name = f"{family}/{item.id}"
    question = item.questions[zlib.crc32(name.encode()) % len(item.questions)]
    return {"id": name, "question": question, "gold": item.gold}


def _take_turns(families: list[list[Task]]) -> list[Task]:
    return [task for turn in zip_longest(*families) for task in turn if task]


def _examples(tasks: list[Task], writers: int) -> list[Example]:
    """The first tasks for the writer, the others for the fixer."""
    mended = (_fixer_example(task, turn) for turn, task in enumerate(tasks[writers:]))
    return [*map(_writer_example, tasks[:writers]), *mended]


def _writer_example(task: Task) -> Example:
    return {"role": "writer", "messages": writer_messages(task["question"]), "completion": task["gold"]}


def _fixer_example(task: Task, turn: int) -> Example:
    broken = break_query(task["gold"], turn)
    messages = fixer_messages(task["question"], broken, failure(broken) or "")
    return {"role": "fixer", "messages": messages, "completion": task["gold"]}
