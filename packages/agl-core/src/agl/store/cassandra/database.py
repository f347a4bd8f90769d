"""One Cassandra keyspace: statements prepared once, many at a time, tried again while nodes come and go."""

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final
from uuid import UUID

from cassandra import ConsistencyLevel, DriverException, InvalidRequest, OperationTimedOut, Timeout, Unavailable
from cassandra.auth import PlainTextAuthProvider
from cassandra.cluster import EXEC_PROFILE_DEFAULT, Cluster, ExecutionProfile, NoHostAvailable, Session
from cassandra.concurrent import execute_concurrent
from cassandra.connection import ConnectionException
from cassandra.metadata import Metadata
from cassandra.policies import DCAwareRoundRobinPolicy, TokenAwarePolicy
from cassandra.query import BatchStatement, BatchType, BoundStatement, PreparedStatement, tuple_factory
from cassandra.util import unix_time_from_uuid1

from agl.errors import InputError, StoreError
from agl.store.cassandra.address import Address
from agl.store.cassandra.schema import migrate

Row = tuple[Any, ...]
Statement = tuple[str, Sequence[Any]]
"""CQL, and the values for its question marks."""

_AT_ONCE: Final = 64
"""Requests of one verb that are under way."""
_TIMEOUT_S: Final = 15.0
"""Of one request; longer than the nodes' own, so that they are asked why."""
_TRY_FOR_S: Final = 20.0
"""How long a verb goes on while too few nodes answer: a lost one is noticed by the others within that time."""
_PAUSE_S: Final = 0.2
_ROWS_AT_ONCE: Final = 5000

_PASSING = (NoHostAvailable, Unavailable, Timeout, OperationTimedOut, ConnectionException)
"""What another try may do better at."""

_log = logging.getLogger(__name__)


class Database:
    """A keyspace shared by threads, processes and machines; made if it is not there.

    Reads and writes are of LOCAL_QUORUM: what is written is found by all that read later, with one node of three away.
    Every statement may be run twice, and is, when its outcome is not known. Raises StoreError, without the password.
    """

    def __init__(self, uri: str) -> None:
        self._address = Address.of(uri)
        self.name = self._address.name
        self._closed = False
        self._prepared: dict[str, PreparedStatement] = {}
        self._preparing = threading.Lock()
        self._cluster = _cluster(self._address)
        try:
            with self._errors("cannot open"):
                self._session = self._open()
        except BaseException:
            self._cluster.shutdown()
            raise

    def now_ns(self) -> int:
        """Time by the clock of a node: those of the machines that share it may differ."""
        return time.time_ns() + self._ahead_ns

    def read(self, query: str, *values: Any) -> list[Row]:
        return self.run([(query, values)])[0]

    def write(self, query: str, *values: Any) -> None:
        self.run([(query, values)])

    def run(self, statements: Iterable[Statement]) -> list[list[Row]]:
        """Run all, several at a time; returns the rows of each once all are done."""
        return self._run([self._bind(*statement) for statement in statements])

    def write_batches(self, batches: Iterable[Sequence[Statement]]) -> None:
        """Write all, each batch as one request. A batch of one partition is kept whole or not at all."""
        self._run([self._batch(statements, BatchType.UNLOGGED) for statements in batches])

    def scan(self, query: str, *values: Any, rows: int = _ROWS_AT_ONCE) -> Iterator[Row]:
        """Rows of a query that may have many, `rows` read at a time."""
        bound = self._bind(query, values)
        bound.fetch_size = rows
        with self._errors("cannot read"):
            yield from self._session.execute(bound)

    def compare_and_set(self, statements: Sequence[Statement], revision: UUID) -> bool:
        """Run all, of one partition, if the first's condition holds; returns whether it did.

        They set the column `revision` to `revision`, which is new: so a try whose answer was lost is known again.
        """
        is_one = len(statements) == 1
        request = self._bind(*statements[0]) if is_one else self._batch(statements, BatchType.LOGGED)
        with self._errors("did not keep the change in"):
            result = self._persist(lambda: self._session.execute(request))
            if result.was_applied:
                return True
            names: list[str] = list(result.column_names or ())
            return "revision" in names and any(row[names.index("revision")] == revision for row in result)

    def replicas(self, keys: Sequence[str | bytes]) -> tuple[str, ...]:
        """Names of the nodes that hold the partition of a table whose key is these columns."""
        found = self._metadata.get_replicas(self._address.keyspace, _routing_key(keys))
        return tuple(sorted(str(host.address) for host in found))

    def close(self) -> None:
        """Wait for nobody and close every connection. May be called twice."""
        self._closed = True
        self._cluster.shutdown()

    @property
    def _metadata(self) -> Metadata:
        metadata: Any = self._cluster.metadata  # None only before the cluster is made.
        return metadata

    def _open(self) -> Session:
        session = self._cluster.connect()
        # Times of the nodes, which run a time service, not of whoever writes.
        session.use_client_timestamp = False
        self._persist(lambda: migrate(self._cluster, session, self._address))
        session.set_keyspace(self._address.keyspace)
        (now,) = session.execute("SELECT now() FROM system.local").one()
        self._ahead_ns = int(unix_time_from_uuid1(now) * 1e9) - time.time_ns()
        return session

    def _prepare(self, query: str) -> PreparedStatement:
        with self._errors("cannot prepare a statement for"), self._preparing:
            if query not in self._prepared:
                self._prepared[query] = self._persist(lambda: self._session.prepare(query))
            return self._prepared[query]

    def _batch(self, statements: Sequence[Statement], kind: Any) -> BatchStatement:
        batch = BatchStatement(kind)
        for statement in statements:
            batch.add(self._bind(*statement))
        return batch

    def _bind(self, query: str, values: Sequence[Any]) -> BoundStatement:
        prepared = self._prepare(query)
        try:
            return prepared.bind(values)
        except (TypeError, ValueError) as error:
            raise InputError(f"the store {self.name} can never keep this: {error}") from error

    def _run(self, requests: Sequence[BoundStatement | BatchStatement]) -> list[list[Row]]:
        found: dict[int, list[Row]] = {}

        def run_rest() -> list[list[Row]]:
            rest = [place for place in range(len(requests)) if place not in found]
            errors = []
            done = execute_concurrent(
                self._session,
                [(requests[place], None) for place in rest],
                concurrency=_AT_ONCE,
                raise_on_first_error=False,
            )
            for place, (is_done, result) in zip(rest, done, strict=True):
                if is_done:
                    found[place] = list(result)
                else:
                    errors.append(result)
            if errors:
                raise next((error for error in errors if not isinstance(error, _PASSING)), errors[0])
            return [found[place] for place in range(len(requests))]

        with self._errors("did not do all that was asked of"):
            return self._persist(run_rest)

    def _persist(self, run: Any) -> Any:
        """What `run` returns, in the end."""
        deadline = time.monotonic() + _TRY_FOR_S
        while True:
            try:
                return run()
            except _PASSING as error:
                if self._closed or time.monotonic() > deadline:
                    raise
                _log.info("trying again at %s: %s", self.name, error)
                time.sleep(_PAUSE_S)

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        if self._closed:
            raise StoreError(f"the store {self.name} is closed")
        try:
            yield
        except InvalidRequest as error:
            raise InputError(f"the store {self.name} can never keep this: {error}") from error
        except (DriverException, NoHostAvailable, ConnectionException) as error:
            if self._closed:
                raise StoreError(f"the store {self.name} is closed") from error
            raise StoreError(f"{what} the store {self.name}: {_say(error)}") from error


def _cluster(address: Address) -> Cluster:
    profile = ExecutionProfile(
        load_balancing_policy=TokenAwarePolicy(DCAwareRoundRobinPolicy(address.datacenter or "")),
        consistency_level=ConsistencyLevel.LOCAL_QUORUM,
        serial_consistency_level=ConsistencyLevel.LOCAL_SERIAL,
        request_timeout=_TIMEOUT_S,
        row_factory=tuple_factory,
    )
    login = PlainTextAuthProvider(address.user, address.password) if address.user else None
    options: dict[str, Any] = {}
    if address.protocol_version is not None:
        options["protocol_version"] = address.protocol_version
    return Cluster(
        list(address.hosts),
        port=address.port,
        auth_provider=login,
        execution_profiles={EXEC_PROFILE_DEFAULT: profile},
        **options,
    )


def _say(error: Exception) -> str:
    if not isinstance(error, NoHostAvailable):
        return str(error)
    return "; ".join(f"{host}: {reason}" for host, reason in dict(error.errors or {}).items()) or "no node answers"


def _routing_key(keys: Sequence[str | bytes]) -> bytes:
    parts = [key.encode() if isinstance(key, str) else key for key in keys]
    if len(parts) == 1:
        return parts[0]
    return b"".join(len(part).to_bytes(2, "big") + part + b"\0" for part in parts)
