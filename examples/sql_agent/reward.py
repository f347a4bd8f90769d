"""The reward of an answer, in three parts from 0 to 1: syntax, efficiency, goal.

Everything is measured against the task's gold query on the same file, and nothing by the clock, so the same answer
always earns the same reward.
"""

import re
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError

from examples.sql_agent.database import QueryError, Result, Row, query

_SELECT = re.compile(r"\s*(SELECT|WITH)\b", re.IGNORECASE)


def score(task: Mapping[str, Any], answer: Mapping[str, Any]) -> dict[str, float]:
    """Score `answer["sql"]` against `task["gold"]`.

    syntax: 1 where sqlglot parses one SELECT. goal: 1 where the rows equal the gold's. efficiency: see `efficiency`;
    0 where the query does not run.
    """
    sql = answer["sql"]
    parts = {"syntax": float(is_select(sql)), "efficiency": 0.0, "goal": 0.0}
    try:
        result = query(sql)
    except QueryError:
        return parts
    gold, ordered = _measure(task["gold"])
    solved = same_rows(result.rows, gold.rows, ordered)
    return parts | {"efficiency": efficiency(result, gold, solved), "goal": float(solved)}


def is_select(sql: str) -> bool:
    """Whether sqlglot reads `sql` as exactly one SELECT (or a union of them) that selects something."""
    if not _SELECT.match(sql):  # sqlglot logs a warning for each statement that it does not know
        return False
    try:
        trees = sqlglot.parse(sql, read="sqlite")
    except (SqlglotError, RecursionError):  # hundreds of open brackets
        return False
    tree = trees[0] if len(trees) == 1 else None
    return isinstance(tree, exp.Select | exp.SetOperation) and bool(tree.selects)


def efficiency(result: Result, gold: Result, solved: bool) -> float:
    """Coverage of what the gold query reads, times thrift with work; from 0 to 1.

    coverage: share of the gold's tables and columns that the compiled query reads, so `SELECT 1` earns nothing.
    thrift: gold's work / work, at most 1. Work is the count of steps that the query plan took. With a wrong result,
    less work than the gold is work left undone, not thrift, so there the ratio counts both ways: otherwise
    `SELECT city FROM customers LIMIT 0` would be the most efficient query of all.
    """
    coverage = len(result.reads & gold.reads) / len(gold.reads)
    thrift = min(1.0, gold.work / result.work)
    return coverage * (thrift if solved else min(thrift, result.work / gold.work))


def same_rows(rows: list[Row], gold: list[Row], ordered: bool) -> bool:
    """Whether both hold the same rows, as often; in the same order where `ordered`. Floats to two decimals."""
    mine, theirs = [_rounded(row) for row in rows], [_rounded(row) for row in gold]
    return mine == theirs if ordered else Counter(mine) == Counter(theirs)


def _rounded(row: Row) -> Row:
    return tuple(round(value, 2) if isinstance(value, float) else value for value in row)


@lru_cache(maxsize=4096)
def _measure(gold: str) -> tuple[Result, bool]:
    """The gold's result, and whether its order matters."""
    return query(gold), "ORDER BY" in gold
