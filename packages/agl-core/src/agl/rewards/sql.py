"""The reward of an answer that is a SQL query: its syntax, its efficiency, and whether its rows are those expected.

The answer runs on a database of any SQLAlchemy URL, read-only and within limits. Needs `agl-core[rewards]`.
"""

import json
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from agl.errors import RewardError
from agl.rewards.combinators import find
from agl.rewards.score import ScoredRollout
from agl.secret_url import SecretUrl

try:
    import sqlalchemy
    import sqlalchemy.exc
    import sqlglot
    from sqlglot import exp
    from sqlglot.errors import SqlglotError
except ImportError as error:
    raise RewardError(
        f"agl.rewards.sql needs sqlglot and SQLAlchemy ({error}): pip install 'agl-core[rewards]'"
    ) from error

_SQLITE_ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
_STEPS_PER_UNIT: Final = 10
"""Steps of SQLite's virtual machine in one unit of work."""
_DIALECTS = {"postgresql": "postgres", "mssql": "tsql", "mariadb": "mysql"}
"""Names of SQLAlchemy that differ from those of sqlglot."""

Row = tuple[Any, ...]


class QueryError(Exception):
    """The database rejected the query, or it exceeded a limit."""


@dataclass
class Result:
    """Rows of a query, and what its plan takes."""

    rows: list[Row] = field(default_factory=list)
    work: float = 1.0
    """SQLite: units of ten steps of its virtual machine, at least 1, the same on every run. PostgreSQL: the cost of the
    plan. Other databases: 1."""
    reads: set[str] = field(default_factory=set)
    """Tables and columns that the query reads: of the compiled query on SQLite, else of its text."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one query."""

    timeout_s: float
    rows: int
    work: int
    value_bytes: int


class Sql:
    """Scorer of the parts syntax, efficiency and goal, each from 0 to 1.

    syntax: 1 if sqlglot parses one SELECT. goal: 1 if the rows equal those of the gold query, each equally often, in
    the same order if the gold query orders them; floats are rounded to `decimals`. efficiency: see `efficiency`; 0 if
    the query fails or exceeds a limit. If the gold query fails, or the database cannot be reached, the reward is
    missing.

    `answer`, `gold`: the function or key that finds the query in the answer, None for the whole answer, and the gold
    query in the task. SQLite and PostgreSQL are made read-only with `timeout_s` per statement; for another database
    `setup` has the statements that do both. `max_work` and `max_value_bytes` limit SQLite only.
    """

    def __init__(
        self,
        url: str,
        *,
        answer: Callable[[Any], str] | str | None = "sql",
        gold: Callable[[Any], str] | str = "gold",
        decimals: int = 2,
        timeout_s: float = 10.0,
        max_rows: int = 1000,
        max_work: int = 50_000,
        max_value_bytes: int = 10_000,
        setup: Sequence[str] = (),
    ) -> None:
        """Raises RewardError if there is no such database, driver, or way to make it read-only."""
        self._answer, self._gold, self._decimals = answer, gold, decimals
        limits = Limits(timeout_s, max_rows, max_work, max_value_bytes)
        name = SecretUrl.shown(url)
        try:
            dialect = sqlalchemy.make_url(url).get_backend_name()
            self._database = (
                _Sqlite(url, limits) if dialect == "sqlite" else _Server(url, dialect, limits, tuple(setup))
            )
        except (sqlalchemy.exc.ArgumentError, ImportError) as error:
            raise RewardError(f"{name} cannot be opened: {SecretUrl(url).hide(str(error))}") from error
        self.dialect = _DIALECTS.get(dialect, dialect)
        self._measured = lru_cache(maxsize=4096)(self._measure)

    def __call__(self, task: Any, answer: Any, rollout: ScoredRollout | None = None) -> dict[str, float]:
        sql = find(answer, self._answer, "answer") or ""
        parts = {"syntax": float(is_select(sql, self.dialect)), "efficiency": 0.0, "goal": 0.0}
        try:
            result = self.query(sql)
        except QueryError:
            return parts
        gold, ordered = self._measured(find(task, self._gold, "task"))
        solved = same_rows(result.rows, gold.rows, ordered, self._decimals)
        return parts | {"efficiency": efficiency(result, gold, solved), "goal": float(solved)}

    def query(self, sql: str) -> Result:
        """Run one SELECT. Raises QueryError if it is none, fails or exceeds a limit."""
        return self._database.query(sql, self.dialect)

    def _measure(self, gold: str) -> tuple[Result, bool]:
        """Result of the gold query, and whether the order of its rows matters."""
        try:
            result = self.query(gold)
        except QueryError as error:
            raise RewardError(f"the gold query fails ({error}): {gold}") from error
        return result, sqlglot.parse_one(gold, read=self.dialect).args.get("order") is not None


def is_select(sql: str, dialect: str) -> bool:
    """Whether sqlglot parses `sql` as exactly one SELECT (or a union of them) that selects at least one column."""
    if not sql.lstrip().upper().startswith(("SELECT", "WITH")):  # sqlglot logs a warning for an unknown statement.
        return False
    try:
        trees = sqlglot.parse(sql, read=dialect)
    except (SqlglotError, RecursionError):  # RecursionError: hundreds of open brackets.
        return False
    tree = trees[0] if len(trees) == 1 else None
    return isinstance(tree, exp.Select | exp.SetOperation) and bool(tree.selects)


def efficiency(result: Result, gold: Result, solved: bool) -> float:
    """Coverage times thrift, from 0 to 1.

    coverage: share of the tables and columns read by the gold query that this query reads too, so `SELECT 1` earns
    nothing. thrift: gold's work / work, at most 1. If the result is wrong, less work than the gold query's is missing
    work, not thrift, so the inverse ratio limits thrift too. Otherwise `SELECT city FROM customers LIMIT 0` would be
    the most efficient query of all.
    """
    coverage = len(result.reads & gold.reads) / len(gold.reads) if gold.reads else 1.0
    thrift = min(1.0, gold.work / result.work)
    return coverage * (thrift if solved else min(thrift, result.work / gold.work))


def same_rows(rows: Sequence[Row], gold: Sequence[Row], ordered: bool, decimals: int = 2) -> bool:
    """Whether both have the same rows equally often, in the same order if `ordered`; floats rounded to `decimals`."""
    mine, theirs = ([tuple(_comparable(value, decimals) for value in row) for row in each] for each in (rows, gold))
    return mine == theirs if ordered else Counter(mine) == Counter(theirs)


def _comparable(value: Any, decimals: int) -> Any:
    if isinstance(value, float | Decimal):
        return round(float(value), decimals)
    return json.dumps(value, sort_keys=True, default=str) if isinstance(value, dict | list) else value


class _Sqlite:
    """A SQLite file: its authorizer allows SELECT only, and its virtual machine counts its steps."""

    def __init__(self, url: str, limits: Limits) -> None:
        name = sqlalchemy.make_url(url).database
        if not name or name == ":memory:":
            raise RewardError(f"{url} is a database in memory, which is empty; name a file, sqlite:///shop.db")
        self._path = Path(name).absolute()
        if not self._path.exists():
            raise RewardError(f"there is no SQLite file at {self._path}")
        self._limits = limits
        self._engine = sqlalchemy.create_engine(url, creator=self._open, poolclass=sqlalchemy.NullPool)

    def query(self, sql: str, dialect: str) -> Result:
        result, limits = Result(work=0), self._limits
        with self._engine.connect() as connection:
            database = connection.connection.driver_connection
            assert isinstance(database, sqlite3.Connection)
            database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, limits.value_bytes)
            deadline = time.monotonic() + limits.timeout_s
            _guard(database, result, lambda: result.work > limits.work or time.monotonic() > deadline)
            try:
                result.rows = database.execute(sql).fetchmany(limits.rows + 1)
            except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
                if "malformed" in str(error) or "not a database" in str(error):
                    raise RewardError(f"{self._path} is damaged: {error}") from error
                interrupted = "interrupted" in str(error)
                raise QueryError("query takes too long" if interrupted else str(error)) from error
        if len(result.rows) > limits.rows:
            raise QueryError(f"more than {limits.rows} rows")
        result.work = max(result.work, 1)
        return result

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(f"{self._path.as_uri()}?mode=ro", uri=True, check_same_thread=False)


def _guard(database: sqlite3.Connection, result: Result, is_over: Callable[[], bool]) -> None:
    """Restrict `database` to SELECT, and record in `result` the tables and columns read and the work done."""

    def authorize(action: int, table: str | None, column: str | None, *_: object) -> int:
        if action == sqlite3.SQLITE_READ and table:
            result.reads |= {table, f"{table}.{column}"} if column else {table}
        return sqlite3.SQLITE_OK if action in _SQLITE_ALLOWED else sqlite3.SQLITE_DENY

    def count() -> bool:
        result.work += 1
        return is_over()

    database.set_authorizer(authorize)
    database.set_progress_handler(count, _STEPS_PER_UNIT)


class _Server:
    """Another database: one SELECT by sqlglot, in a read-only session with a timeout, and never committed."""

    _SETUP: Final[Mapping[str, tuple[str, ...]]] = {
        "postgresql": (
            "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
            "SET SESSION statement_timeout = {milliseconds}",
        )
    }

    def __init__(self, url: str, dialect: str, limits: Limits, setup: tuple[str, ...]) -> None:
        if not setup and dialect not in self._SETUP:
            raise RewardError(
                f"it is not known how a session of {dialect} becomes read-only and gets a timeout; pass the statements "
                "that do both as setup=[...]"
            )
        milliseconds = int(limits.timeout_s * 1000)
        self._setup = setup or tuple(line.format(milliseconds=milliseconds) for line in self._SETUP[dialect])
        self._limits = limits
        self._explains = dialect == "postgresql"
        self._engine = sqlalchemy.create_engine(url, pool_pre_ping=True, execution_options={"no_parameters": True})

    def query(self, sql: str, dialect: str) -> Result:
        if not is_select(sql, dialect):
            raise QueryError("expected one SELECT")
        result = Result(reads=_names_in(sql, dialect))
        with self._session() as session, _query_errors():
            if self._explains:
                plan = session.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {sql}").scalar_one()
                result.work = max((plan if isinstance(plan, list) else json.loads(plan))[0]["Plan"]["Total Cost"], 1e-9)
            rows = session.exec_driver_sql(sql, execution_options={"stream_results": True})  # a million fill no memory
            result.rows = [tuple(row) for row in rows.fetchmany(self._limits.rows + 1)]
        if len(result.rows) > self._limits.rows:
            raise QueryError(f"more than {self._limits.rows} rows")
        return result

    @contextmanager
    def _session(self) -> "Iterator[sqlalchemy.Connection]":
        with self._engine.connect() as session:
            for statement in self._setup:
                session.exec_driver_sql(statement)
            session.commit()
            try:
                yield session
            finally:
                if not session.invalidated:
                    session.rollback()


@contextmanager
def _query_errors() -> "Iterator[None]":
    """Errors of the query as QueryError; a lost connection is no fault of the query."""
    try:
        yield
    except sqlalchemy.exc.DBAPIError as error:
        if error.connection_invalidated:
            raise
        raise QueryError(str(error.orig).partition("\n")[0]) from error


def _names_in(sql: str, dialect: str) -> set[str]:
    """Tables and columns that a query names."""
    tree = sqlglot.parse_one(sql, read=dialect)
    views = {view.alias_or_name for view in tree.find_all(exp.CTE)}
    tables = {table.name for table in tree.find_all(exp.Table)} - views
    return tables | {f".{column.name}" for column in tree.find_all(exp.Column)}
