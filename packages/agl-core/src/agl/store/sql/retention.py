"""`gc` in an SQL database: walks the spans by arrival and deletes the rollouts that are over."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Generic

from agl.store.membership import SPANS_OF_KEY, first_keys
from agl.store.protocol import Collected
from agl.store.retention import Limits
from agl.store.sql.database import Connection, DatabaseT
from agl.store.sql.rollouts import get_rollout
from agl.store.sql.traffic import DELETE_DECISIONS

_SPANS_PER_READ: Final = 200

_LAST_ARRIVAL = f"SELECT max(arrived_ns) FROM spans WHERE {SPANS_OF_KEY}"
_DELETE_ROLLOUT = "DELETE FROM rollouts WHERE rollout_id = ?"
_DELETE_WITHOUT_SPANS = """
DELETE FROM rollouts
WHERE ended_ns < ? AND NOT EXISTS (SELECT 1 FROM spans WHERE spans.rollout_id = rollouts.rollout_id)
"""
_DELETE_ATTEMPTS = "DELETE FROM attempts WHERE rollout_id NOT IN (SELECT rollout_id FROM rollouts)"


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A rollout to examine. `arrived_ns` is the arrival of its first span."""

    name: str
    is_named: bool
    """False for a trace of which no span names a rollout so far."""
    arrived_ns: int


class Retention(ABC, Generic[DatabaseT]):
    """One run of `gc`. Each rollout is deleted whole, in one transaction."""

    POSITION: ClassVar[str]
    """Columns of `spans` that order them by arrival. All are above 0."""
    MEMBERS: ClassVar[str]
    """`WITH RECURSIVE member (rollout, trace)`: the keys of a rollout; parameters are `first_keys`."""
    OWNERS: ClassVar[str]
    """`owners_query`."""
    ROLLOUTS_PER_TRANSACTION: ClassVar[int]

    def __init__(self, database: DatabaseT, limits: Limits) -> None:
        self.database = database
        self.limits = limits
        self._rollouts = 0
        self._spans = 0
        self._seen: set[str] = set()

    @abstractmethod
    def is_over_size(self, db: Connection) -> bool:
        """Whether the store takes up more than `limits.max_bytes`."""

    @abstractmethod
    def prepare(self, db: Connection) -> None:
        """Called at the start of each transaction."""

    @abstractmethod
    def delete_spans(self, db: Connection, parameters: dict[str, Any]) -> Sequence[Any]:
        """Delete the spans of `SPANS_OF_KEY` that arrived by `:last_ns`; returns an item for each."""

    def note_deleted(self, spans: Sequence[Any]) -> None:
        """Count a rollout whose spans are deleted and committed."""
        self._rollouts += 1
        self._spans += len(spans)

    def release(self) -> None:
        """Free what the deleted spans have left."""

    def collect(self) -> Collected:
        self._walk()
        deleted = self.database.write(self._delete_without_spans)
        self.release()
        return Collected(self._rollouts + deleted, self._spans)

    def _walk(self) -> None:
        number = self.POSITION.count(",") + 1
        columns = f"{self.POSITION}, arrived_ns, rollout_id, trace_id"
        after = f"({self.POSITION}) > ({', '.join('?' * number)})"
        query = f"SELECT {columns} FROM spans WHERE {after} ORDER BY {self.POSITION} LIMIT {_SPANS_PER_READ}"
        position = (0,) * number
        while rows := self.database.read(lambda db, position=position: db.execute(query, position).fetchall()):
            candidates = list(self._candidates(row[number:] for row in rows))
            for first in range(0, len(candidates), self.ROLLOUTS_PER_TRANSACTION):
                if not self._delete_some(candidates[first : first + self.ROLLOUTS_PER_TRANSACTION]):
                    return
            position = tuple(rows[-1][:number])

    def _candidates(self, rows: Iterator[Any]) -> Iterator[_Candidate]:
        for arrived_ns, rollout_id, trace_id in rows:
            name = rollout_id or trace_id.hex()
            if name not in self._seen:
                self._seen.add(name)
                yield _Candidate(name, rollout_id is not None, arrived_ns)

    def _delete_some(self, candidates: Sequence[_Candidate]) -> bool:
        """Delete those of the candidates that may go. Returns False once one arrived too late to be deleted."""

        def work(db: Connection) -> tuple[list[list[Any]], bool]:
            self.prepare(db)
            deleted: list[list[Any]] = []
            for candidate in candidates:
                if not self._must_go(db, candidate.arrived_ns):
                    return deleted, False
                deleted.append(self._delete(db, candidate))
            return deleted, True

        deleted, goes_on = self.database.write(work)
        for spans in filter(None, deleted):  # Empty: the rollout stays, or its spans went with another rollout.
            self.note_deleted(spans)
        return goes_on

    def _must_go(self, db: Connection, last_ns: int) -> bool:
        return last_ns < self.limits.before_ns or self.is_over_size(db)

    def _delete(self, db: Connection, candidate: _Candidate) -> list[Any]:
        """Delete a rollout if the rule allows it; returns its spans."""
        name = candidate.name
        keys, own = self.keys(db, name)
        if len(own) < len(keys) and not candidate.is_named:  # The trace goes with the rollouts that own it.
            return []
        last_ns = self.limits.over_since(get_rollout(db, name), max(_last_arrival(db, key) for key in own))
        if last_ns is None or not self._must_go(db, last_ns):
            return []
        db.execute(_DELETE_ROLLOUT, (name,))
        # `last_ns` keeps the spans that arrived since it was read.
        return [span for key in own for span in self.delete_spans(db, parameters_of(key) | {"last_ns": last_ns})]

    def keys(self, db: Connection, rollout_id: str) -> tuple[list[Any], list[Any]]:
        """The keys of a rollout, and those of them that belong to no other rollout."""
        query = f"{self.MEMBERS} SELECT rollout, trace FROM member WHERE rollout IS NOT NULL OR trace IS NOT NULL"
        keys: list[Any] = db.execute(query, first_keys(rollout_id)).fetchall()
        return keys, [key for key in keys if not self._owners(db, key) - {rollout_id}]

    def _owners(self, db: Connection, key: Any) -> set[str]:
        return set() if key[1] is None else {name for (name,) in db.execute(self.OWNERS, parameters_of(key))}

    def _delete_without_spans(self, db: Connection) -> int:
        """Delete rollouts that are over and have no spans, the attempts of all deleted rollouts, and old decisions."""
        deleted = db.execute(_DELETE_WITHOUT_SPANS, (self.limits.before_ns,)).rowcount
        db.execute(_DELETE_ATTEMPTS)
        db.execute(DELETE_DECISIONS, (self.limits.before_ns,))
        return deleted


def parameters_of(key: Any) -> dict[str, Any]:
    """Parameters of `SPANS_OF_KEY`."""
    return {"rollout": key[0], "trace": key[1]}


def _last_arrival(db: Connection, key: Any) -> int:
    return db.execute(_LAST_ARRIVAL, parameters_of(key)).fetchone()[0] or 0
