"""The database that the shared verbs need. Statements have the placeholders `?` and `:name`, as in SQLite."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

Result = TypeVar("Result")
Rows = Sequence[Any]


class Cursor(Protocol):
    @property
    def rowcount(self) -> int: ...
    def fetchone(self) -> Any: ...
    def fetchall(self) -> list[Any]: ...
    def __iter__(self) -> Iterator[Any]: ...


class Connection(Protocol):
    def execute(self, sql: str, parameters: Any = ..., /) -> Cursor: ...

    def executemany(self, sql: str, parameters: Iterable[Any], /) -> None: ...

    def select_by_id(self, columns: str, table: str, key: str, ids: Iterable[str], *, lock: bool = False) -> Rows:
        """Rows of `table` whose `key` is one of `ids`, ordered by it; `lock` locks them until the transaction ends."""
        ...

    def lock_first(self, query: str, parameters: Sequence[Any] = ()) -> Any:
        """First row of `query`, a free one before a locked one, locked until the transaction ends; None if none."""
        ...

    def json_text(self, column: str, key: str) -> str:
        """SQL of the text at `key` of the JSON object in `column`."""
        ...

    def lock_name(self, name: str) -> None:
        """Wait for other transactions that have locked `name`, and keep it locked until this one ends."""
        ...

    def notify_end(self) -> None:
        """On commit, notify the other processes that rollouts may have ended, if the database can do that."""
        ...


class Database(Protocol):
    def write(self, work: Callable[[Connection], Result]) -> Result:
        """Run `work` in a transaction; returns its result after the commit. May run `work` more than once."""
        ...

    def read(self, work: Callable[[Connection], Result]) -> Result:
        """Run `work`, which only reads."""
        ...

    def now_ns(self) -> int:
        """Unix time by the clock of the database."""
        ...

    def close(self) -> None: ...


DatabaseT = TypeVar("DatabaseT", bound=Database)


def write_many(database: Database, sql: str, rows: Iterable[Sequence[Any]]) -> None:
    """Execute `sql` once for each of `rows`, in one transaction."""
    database.write(lambda db: db.executemany(sql, rows))
