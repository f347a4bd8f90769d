"""Training tasks, held-out tasks, and gold traces for supervised training.

A task is `{"question", "article", "pieces"}`. Articles are split once. Held-out articles never occur in training, but
their items and colours do, in different combinations.
"""

import json
from itertools import product
from typing import Any

from examples.autogen_team.agent import EXECUTOR_SYSTEM, PLANNER_SYSTEM
from examples.autogen_team.inventory import COLOURS, ITEMS, PIECES, STOCK, article_of

Task = dict[str, Any]
Example = dict[str, Any]

QUESTIONS = ("How many {colour} {item}s?", "{item}s in {colour}: how many?", "Count the {colour} {item}s.")


def train_tasks() -> list[Task]:
    """Every question about the articles for training."""
    return [task for task in _tasks() if task["article"] not in _held_out()]


def eval_tasks() -> list[Task]:
    """Every question about the held-out articles."""
    return [task for task in _tasks() if task["article"] in _held_out()]


def gold_examples() -> list[Example]:
    """Gold traces of both roles, made from every fourth training task."""
    tasks = train_tasks()[::4]
    return [*map(_planner_example, tasks), *map(_executor_example, tasks)]


def _tasks() -> list[Task]:
    return [_task(*combination) for combination in product(ITEMS, COLOURS, QUESTIONS)]


def _task(item: str, colour: str, question: str) -> Task:
    article = article_of(item, colour)
    return {"question": question.format(item=item, colour=colour), "article": article, "pieces": PIECES[article]}


def _held_out() -> set[str]:
    """One colour of each item, in turn."""
    return {article_of(item, COLOURS[turn % len(COLOURS)]) for turn, item in enumerate(ITEMS)}


def _planner_example(task: Task) -> Example:
    messages = [_message("system", PLANNER_SYSTEM), _message("user", task["question"])]
    return {"role": "planner", "messages": messages, "completion": task["article"]}


def _executor_example(task: Task) -> Example:
    """AutoGen presents the planner's message to the executor as a message with the role `user`."""
    messages = [
        _message("system", EXECUTOR_SYSTEM),
        _message("user", task["question"]),
        _message("user", task["article"]),
    ]
    call = json.dumps({"name": STOCK.name, "arguments": {"article": task["article"]}})
    tools = [{"type": "function", "function": STOCK.schema}]
    completion = f"<tool_call>{call}</tool_call>"
    return {"role": "executor", "messages": messages, "completion": completion, "tools": tools}


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
