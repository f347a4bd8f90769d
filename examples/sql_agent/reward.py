"""The reward of an answer in three dimensions from 0 to 1: syntax, efficiency, goal.

All three compare the answer with the task's gold query on the same file. None depends on wall time, unless a query
takes 10 seconds, so the same answer always earns the same reward.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

from agl.rewards.sql import Sql
from examples.sql_agent.database import MAX_ROWS, MAX_VALUE_BYTES, MAX_WORK, shop


def score(task: Mapping[str, Any], answer: Mapping[str, Any]) -> dict[str, float]:
    """Score `answer["sql"]` against `task["gold"]`; see `agl.rewards.sql.Sql`."""
    return shop_scorer()(task, answer)


@cache
def shop_scorer() -> Sql:
    """The scorer of the shop, with the limits of the agent's queries."""
    return Sql(f"sqlite:///{shop()}", max_rows=MAX_ROWS, max_work=MAX_WORK, max_value_bytes=MAX_VALUE_BYTES)
