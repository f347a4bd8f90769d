"""Finds damage in the file of a store, row by row, and the rollouts that it touches. Never writes."""

import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from agl.errors import AglError
from agl.store.span_row import checksum, row_of
from agl.store.sql.damage import TABLES
from agl.store.sqlite.database import SqliteConnection, is_damage
from agl.store.sqlite.spans import NEW_ASKS

_MAX_ERRORS: Final = 20
_ROWS_PER_READ: Final = 256
_MAX_GAP: Final = 10_000_000
"""Limit for the arrivals to try one by one where neither table nor index tell which there are."""

SPAN_COLUMNS: Final = "arrival, trace_id, span_id, rollout_id, start_ns, arrived_ns, asked, answered, checksum, otlp"
_SPANS: Final = f"SELECT {SPAN_COLUMNS} FROM spans NOT INDEXED WHERE arrival BETWEEN ? AND ? ORDER BY arrival"
_ALL: Final = f"SELECT {SPAN_COLUMNS} FROM spans NOT INDEXED ORDER BY arrival"
_WALK: Final = "SELECT arrival FROM spans NOT INDEXED ORDER BY arrival"
_BY_ID: Final = "SELECT arrival, trace_id FROM spans INDEXED BY spans_by_id"
_BY_ROLLOUT: Final = (
    "SELECT arrival, rollout_id FROM spans INDEXED BY spans_by_rollout WHERE rollout_id IS NOT NULL ORDER BY rollout_id"
)
_MISSING_ASKS: Final = f"""
SELECT asked, arrival FROM spans WHERE asked IS NOT NULL
EXCEPT SELECT * FROM asks EXCEPT {NEW_ASKS}
"""

Record = tuple[Any, ...]
"""A row of a table; of `spans`: `SPAN_COLUMNS`."""
_Owners = dict[bytes, set[str]]
"""Trace to the rollouts that its spans name."""


@dataclass
class Damage:
    """What `find` found."""

    errors: list[str] = field(default_factory=list)
    """Errors in the structure of the file."""
    rollouts: dict[str, int] = field(default_factory=dict)
    """Rollout to the number of its spans that are not what was stored, or that cannot be read."""

    def lines(self) -> list[str]:
        """One line for each finding."""
        return self.errors + [
            f"rollout {name}: {number} of its spans damaged" for name, number in self.rollouts.items()
        ]


def find(db: SqliteConnection) -> Damage:
    """Read the whole file. Raises sqlite3.Error if it cannot be read for a reason that is not damage."""
    db.text_factory = lambda text: text.decode(errors="replace")  # Damaged text is damage, not an error.
    damage = Damage(_structure(db))
    if not damage.errors and _is_sound(db):
        return damage
    touched: dict[str, int] = defaultdict(int)
    try:
        for _, names in read_spans(db):
            for name in names:
                touched[name] += 1
        damage.errors += _other_tables(db)
    except sqlite3.Error as error:
        _raise_unless_damage(error)
        damage.errors.append(str(error))
    damage.rollouts = dict(sorted(touched.items()))
    return damage


def _is_sound(db: SqliteConnection) -> bool:
    """The quick way through a file without damage."""
    try:
        return all(map(is_whole, db.execute(_ALL))) and not _other_tables(db)
    except sqlite3.Error as error:
        _raise_unless_damage(error)
        return False


def read_spans(db: SqliteConnection) -> Iterator[tuple[Record | None, set[str]]]:
    """Each span, and the rollouts that it touches if it is damaged; the span is None if it cannot be read."""
    named = _pairs(db, _BY_ROLLOUT)
    traces = _pairs(db, _BY_ID)
    of_trace: _Owners = {}
    for arrival, name in named.items():
        of_trace.setdefault(traces.get(arrival, b""), set()).add(name)
    for arrival, row in _rows(db, sorted({*traces, *named, *_walk(db)})):
        if row is not None and is_whole(row) and named.get(arrival, row[3]) == row[3]:
            yield row, set()
        else:
            yield row, _touched(row, named.get(arrival), traces.get(arrival), of_trace)


def is_whole(row: Record) -> bool:
    """Whether a span is what was stored, and its columns are those of its content."""
    _, trace_id, span_id, rollout_id, start_ns, _, asked, answered, known, otlp = row
    try:
        found = row_of(otlp)
        is_same = known is None or checksum(otlp) == known
    except (AglError, TypeError):
        return False
    columns = (found.trace_id, found.span_id, found.rollout_id, found.start_ns, found.asked, found.answered)
    return is_same and columns == (trace_id, span_id, rollout_id, start_ns, asked, answered)


def read_table(db: SqliteConnection, query: str, order: str) -> list[Any]:
    """The rows of `query` that can be read: from both ends of this order up to the first damage."""
    rows: dict[Any, None] = {}
    for direction in ("ASC", "DESC"):
        try:
            for row in db.execute(f"{query} ORDER BY {order.replace(',', f' {direction},')} {direction}"):
                rows[row] = None
        except sqlite3.Error as error:
            _raise_unless_damage(error)
        else:
            break
    return list(rows)


def _structure(db: SqliteConnection) -> list[str]:
    """SQLite's own check, which compares every index with its table."""
    try:
        found = [line for (text,) in db.execute(f"PRAGMA integrity_check({_MAX_ERRORS})") for line in text.splitlines()]
    except sqlite3.Error as error:
        _raise_unless_damage(error)
        return [str(error)]
    return [] if found == ["ok"] else found[:_MAX_ERRORS]


def _other_tables(db: SqliteConnection) -> list[str]:
    missing = db.execute(_MISSING_ASKS).fetchall()
    errors = [f"{len(missing)} entries of the index of requested responses are damaged"] if missing else []
    for table in TABLES:
        rows = db.execute(f"SELECT {table.columns} FROM {table.name}")
        errors += [table.finding(row) for row in rows if not table.is_whole(row)]
    return errors


def _pairs(db: SqliteConnection, query: str) -> dict[int, Any]:
    """Arrival to a column of an index, as far as the index can be read."""
    found: dict[int, Any] = {}
    try:
        for arrival, value in db.execute(query):
            found[arrival] = value
    except sqlite3.Error as error:
        _raise_unless_damage(error)
    return found


def _walk(db: SqliteConnection) -> set[int]:
    """The arrivals in the table; between those that can be read from both ends, all that there may be."""
    ends: list[int] = []
    found: set[int] = set()
    for direction in ("ASC", "DESC"):
        some: list[int] = []
        try:
            some += [arrival for (arrival,) in db.execute(f"{_WALK} {direction}")]
            return found | set(some)
        except sqlite3.Error as error:
            _raise_unless_damage(error)
        found |= set(some)
        ends.append(some[-1] if some else 0)
    first, last = sorted(ends)
    return found | set(range(first, min(last, first + _MAX_GAP)))


def _rows(db: SqliteConnection, arrivals: Sequence[int]) -> Iterator[tuple[int, Record | None]]:
    """The span of each of these arrivals, None where it cannot be read."""
    for first in range(0, len(arrivals), _ROWS_PER_READ):
        yield from _read_some(db, arrivals[first : first + _ROWS_PER_READ])


def _read_some(db: SqliteConnection, arrivals: Sequence[int]) -> Iterator[tuple[int, Record | None]]:
    try:
        found = {row[0]: row for row in db.execute(_SPANS, (arrivals[0], arrivals[-1]))}
    except sqlite3.Error as error:
        _raise_unless_damage(error)
        found = {}
        if len(arrivals) > 1:
            middle = len(arrivals) // 2
            yield from _read_some(db, arrivals[:middle])
            yield from _read_some(db, arrivals[middle:])
            return
    for arrival in arrivals:
        yield arrival, found.get(arrival)


def _touched(row: Record | None, named: str | None, trace: bytes | None, of_trace: _Owners) -> set[str]:
    """The rollouts of a damaged span: those that its column, its content or an index name, else those of its trace."""
    names = {name for name in (named, row and row[3], _content_name(row)) if isinstance(name, str)}
    if names:
        return names
    for found in {each for each in (trace, row and row[1]) if isinstance(each, bytes)}:
        names |= of_trace.get(found) or {found.hex()}
    return names


def _content_name(row: Record | None) -> str | None:
    """The rollout that the content of a damaged span names, if it can be parsed."""
    try:
        return row_of(row[-1]).rollout_id if row else None
    except (AglError, TypeError):
        return None


def _raise_unless_damage(error: sqlite3.Error) -> None:
    if not is_damage(error):
        raise error
