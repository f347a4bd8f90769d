"""The rows of rollouts, attempts and resources that are not what was stored."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from agl.store.mapping import (
    ATTEMPT_ROW,
    PART_ROW,
    RESOURCE_ROW,
    ROLLOUT_ROW,
    is_attempt,
    is_part,
    is_resource,
    is_rollout,
)
from agl.store.sql.database import Connection, Database


@dataclass(frozen=True, slots=True)
class CheckedTable:
    """A table whose rows have a checksum; `keys` are its first columns."""

    name: str
    columns: str
    keys: Sequence[str]
    is_whole: Callable[[Sequence[Any]], bool]
    title: str
    rows_per_read: int = 500

    def finding(self, row: Sequence[Any]) -> str:
        return f"the row of {self.title.format(*row)} is damaged"


TABLES: Final = (
    CheckedTable("rollouts", ROLLOUT_ROW, ("rollout_id",), is_rollout, "rollout {0}"),
    CheckedTable("attempts", ATTEMPT_ROW, ("attempt_id",), is_attempt, "attempt {0}"),
    CheckedTable("resources", RESOURCE_ROW, ("name", "version"), is_resource, "resource {0}@{1}"),
    CheckedTable("resource_parts", PART_ROW, ("name", "version", "digest"), is_part, "resource part {2} of {0}@{1}", 8),
)


def damaged_rows(database: Database) -> Iterator[tuple[CheckedTable, Sequence[Any]]]:
    """Table and row of each."""
    for table in TABLES:
        keys, number = ", ".join(table.keys), len(table.keys)
        select, order = f"SELECT {table.columns} FROM {table.name}", f"ORDER BY {keys} LIMIT {table.rows_per_read}"
        rows = database.read(lambda db, query=f"{select} {order}": db.execute(query).fetchall())
        while rows:
            yield from ((table, row) for row in rows if not table.is_whole(row))
            query, last = f"{select} WHERE ({keys}) > ({', '.join('?' * number)}) {order}", rows[-1][:number]
            rows = database.read(lambda db, query=query, last=last: db.execute(query, last).fetchall())


def delete_row(db: Connection, table: CheckedTable, row: Sequence[Any]) -> None:
    condition = " AND ".join(f"{key} = ?" for key in table.keys)
    db.execute(f"DELETE FROM {table.name} WHERE {condition}", tuple(row[: len(table.keys)]))
