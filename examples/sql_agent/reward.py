"""The reward of an answer in three dimensions from 0 to 1: syntax, efficiency, goal.

All three compare the answer with the task's gold query on the same file. None depends on wall time, so the same answer
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

    syntax: 1 if sqlglot parses one SELECT. goal: 1 if the rows equal those of the gold query. efficiency: see
    `efficiency`; 0 if the query does not run.
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
    """Whether sqlglot parses `sql` as exactly one SELECT (or a union of them) that selects at least one column."""
    if not _SELECT.match(sql):  # Otherwise sqlglot logs a warning for each statement that it does not know.
        return False
    try:
        trees = sqlglot.parse(sql, read="sqlite")
    except (SqlglotError, RecursionError):  # RecursionError: hundreds of open brackets.
        return False
    tree = trees[0] if len(trees) == 1 else None
    return isinstance(tree, exp.Select | exp.SetOperation) and bool(tree.selects)


def efficiency(result: Result, gold: Result, solved: bool) -> float:
    """Coverage times thrift, from 0 to 1.

    coverage: share of the tables and columns read by the compiled gold query that this query reads too, so `SELECT 1`
    earns nothing. thrift: gold's work / work, at most 1; work counts the steps of the query plan. If the result is
    wrong, less work than the gold query's is missing work, not thrift, so the inverse ratio limits thrift too.
    Otherwise `SELECT city FROM customers LIMIT 0` would be the most efficient query of all.
    """
    coverage = len(result.reads & gold.reads) / len(gold.reads)
    thrift = min(1.0, gold.work / result.work)
    return coverage * (thrift if solved else min(thrift, result.work / gold.work))


def same_rows(rows: list[Row], gold: list[Row], ordered: bool) -> bool:
    """Whether both have the same rows equally often, and in the same order if `ordered`. Floats to two decimals."""
    mine, theirs = [_rounded(row) for row in rows], [_rounded(row) for row in gold]
    return mine == theirs if ordered else Counter(mine) == Counter(theirs)


def _rounded(row: Row) -> Row:
    return tuple(round(value, 2) if isinstance(value, float) else value for value in row)


@lru_cache(maxsize=4096)
def _measure(gold: str) -> tuple[Result, bool]:
    """Result of the gold query, and whether the order of its rows matters."""
    return query(gold), "ORDER BY" in gold
