"""Agent, tasks and reward of `benchmarks.several_models`: a planner reads an order, an executor writes it as JSON.

The planner is scored by the customer's order, the executor by the plan that it gets, whether that is right or not.
"""

import json
import os
import random
import re
from functools import lru_cache
from typing import Any

from openai import OpenAI

import agl

Task = dict[str, Any]

_COUNTS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9}
_ITEMS = (
    "lamp",
    "chair",
    "table",
    "book",
    "candle",
    "carpet",
    "mirror",
    "basket",
    "blanket",
    "clock",
    "pillow",
    "vase",
)
_CITIES = ("Oslo", "Rome", "Madrid", "Vienna", "Dublin", "Athens", "Lisbon", "Prague", "Warsaw", "Berlin")
_ORDERS = (
    "Please send {count} {item}s to {city}.",
    "{count} {item}s for the new house in {city}, thanks.",
    "Please send {not_count} {item}s to {city}, no, make it {count}.",
    "I wanted {not_count} {not_item}s, but {count} {item}s fit better; they go to {city}.",
    "Our shop in {not_city} has enough {item}s, the one in {city} needs {count}.",
    "Not {not_city} but {city} gets the {count} {item}s.",
)
"""What a customer takes back is not in the plan."""
_PLAN = re.compile(r"item: (\w+), count: (\d+), city: (\w+)\s*")
_FIELDS = ("item", "count", "city")
_LONGEST = 200
"""Characters of a plan that the executor reads."""


def _orders(seed: int, count: int) -> list[Task]:
    draw, made = random.Random(seed), dict[str, Task]()
    while len(made) < count:
        (word, no_word), (item, no_item), (city, no_city) = (draw.sample(of, 2) for of in ([*_COUNTS], _ITEMS, _CITIES))
        left_out = {"not_count": no_word, "not_item": no_item, "not_city": no_city}
        text = draw.choice(_ORDERS).format(count=word, item=item, city=city, **left_out)
        made[text] = {"id": text, "text": text, "item": item, "count": _COUNTS[word], "city": city}
    return [*made.values()]


_TAUGHT, _DRAWN, _HELD_OUT = slice(0, 12), slice(12, 144), slice(144, 192)


@lru_cache(maxsize=1)
def _all() -> list[Task]:
    return _orders(20, 192)


def train_tasks() -> list[Task]:
    return _all()[_DRAWN]


def held_out_tasks() -> list[Task]:
    return _all()[_HELD_OUT]


def examples() -> list[dict[str, Any]]:
    """Of orders that no step draws: both roles only see the format often enough to hit it now and then."""
    made = []
    for task in _all()[_TAUGHT]:
        plan = f"item: {task['item']}, count: {task['count']}, city: {task['city']}"
        made.append({"role": "planner", "messages": _planner(task["text"]), "completion": plan})
        order = json.dumps({name: task[name] for name in _FIELDS})
        made.append({"role": "executor", "messages": _executor(plan), "completion": order})
    return made


def run(task: Task) -> dict[str, str]:
    """The agent: one call of each role."""
    plan = _ask("planner", _planner(task["text"]))
    return {"plan": plan, "order": _ask("executor", _executor(plan))}


def score(task: Task, answer: dict[str, str], _: Any) -> dict[str, float]:
    """`plan`: share of the order's fields in the plan. `order`: share of the plan's fields in the JSON."""
    plan, order = _read_plan(answer["plan"]), _read_order(answer["order"])
    read = [plan.get(name) == str(task[name]) for name in _FIELDS]
    written = [name in plan and order.get(name) == plan[name] for name in _FIELDS]
    return {"plan": sum(read) / len(_FIELDS), "order": sum(written) / len(_FIELDS)}


def _read_plan(text: str) -> dict[str, str]:
    found = _PLAN.fullmatch(text.strip())
    return dict(zip(_FIELDS, found.groups(), strict=True)) if found else {}


def _read_order(text: str) -> dict[str, str]:
    try:
        order = json.loads(text)
        return {name: str(value) for name, value in order.items()}
    except (ValueError, AttributeError, RecursionError):
        return {}


def _planner(order: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Order: {order}\nWrite it as `item: ..., count: ..., city: ...`."}]


def _executor(plan: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Write this as JSON with the keys item, count, city: {plan[:_LONGEST]}"}]


def _ask(role: str, messages: Any) -> str:
    answered = _client(os.environ["OPENAI_BASE_URL"]).chat.completions.create(
        model=role, messages=messages, extra_headers=agl.headers()
    )
    return answered.choices[0].message.content or ""


@lru_cache(maxsize=1)
def _client(base_url: str) -> OpenAI:
    """The next seed's training, in the same process, has another gateway."""
    return OpenAI(base_url=base_url)
