"""A Cassandra keyspace: prepared statements, concurrent requests, retries while nodes fail and recover."""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypeVar
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
from agl.store.clock import Clock

Result = TypeVar("Result")
Record = tuple[Any, ...]
"""A row of a result."""
Statement = tuple[str, Sequence[Any]]
"""CQL, and the values of its placeholders."""

_CONCURRENT_REQUESTS: Final = 64
"""For each verb."""
_TIMEOUT_S: Final = 15.0
"""For one request; longer than the timeouts of the nodes, whose errors say more."""
_TRY_FOR_S: Final = 20.0
"""How long a verb retries while too few nodes answer. The nodes detect the failure of another within that time."""
_PAUSE_S: Final = 0.2
_PAGE_ROWS: Final = 5000
_MAX_CONFLICTS: Final = 50
_FIRST_BACKOFF_S: Final = 0.002
_MAX_BACKOFF_S: Final = 0.05

_TRANSIENT = (NoHostAvailable, Unavailable, Timeout, OperationTimedOut, ConnectionException)

_log = logging.getLogger(__name__)


class Keyspace:
    """A keyspace shared by threads, processes and machines; created if it does not exist.

    Reads and writes use LOCAL_QUORUM: a read finds all earlier writes, also with one node of three down. A statement
    whose outcome is unknown runs again, so each must be idempotent. Raises StoreError, without the password.
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
        """Unix time by the clock of a node: the clocks of its clients may differ."""
        return self._clock.now_ns()

    def read(self, query: str, *values: Any) -> list[Record]:
        return self.run([(query, values)])[0]

    def write(self, query: str, *values: Any) -> None:
        self.run([(query, values)])

    def run(self, statements: Iterable[Statement]) -> list[list[Record]]:
        """Run all statements concurrently; returns the rows of each."""
        return self._run([self._bind(*statement) for statement in statements])

    def write_batches(self, batches: Iterable[Sequence[Statement]]) -> None:
        """Write each batch as one request. A batch of one partition is atomic."""
        self._run([self._batch(statements, BatchType.UNLOGGED) for statements in batches])

    def scan(self, query: str, *values: Any, page_rows: int = _PAGE_ROWS) -> Iterator[Record]:
        """Rows of a query that may have many, read in pages."""
        bound = self._bind(query, values)
        bound.fetch_size = page_rows
        with self._errors("cannot read"):
            yield from self._session.execute(bound)

    def compare_and_set(self, statements: Sequence[Statement], revision: UUID) -> bool:
        """Run statements of one partition if the condition of the first one holds; returns whether it did.

        They set the column `revision` to `revision`, a new UUID, which a retry finds there after a lost response.
        """
        request = self._bind(*statements[0]) if len(statements) == 1 else self._batch(statements, BatchType.LOGGED)
        with self._errors("did not keep the change in"):
            result = self._persist(lambda: self._session.execute(request))
            if result.was_applied:
                return True
            names: list[str] = list(result.column_names or ())
            return "revision" in names and any(row[names.index("revision")] == revision for row in result)

    def replicas(self, keys: Sequence[str | bytes]) -> tuple[str, ...]:
        """Addresses of the nodes that store the partition with this partition key."""
        found = self._metadata.get_replicas(self._address.keyspace, _routing_key(keys))
        return tuple(sorted(str(host.address) for host in found))

    def close(self) -> None:
        """Close all connections without waiting for requests. May be called twice."""
        self._closed = True
        self._cluster.shutdown()

    @property
    def _metadata(self) -> Metadata:
        metadata: Any = self._cluster.metadata  # None only before the driver has connected.
        return metadata

    def _open(self) -> Session:
        session = self._cluster.connect()
        # Write timestamps by the clocks of the nodes, which are synchronised, not of the clients.
        session.use_client_timestamp = False
        self._persist(lambda: migrate(self._cluster, session, self._address))
        session.set_keyspace(self._address.keyspace)
        (now,) = session.execute("SELECT now() FROM system.local").one()
        self._clock = Clock(self.name, int(unix_time_from_uuid1(now) * 1e9))
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

    def _run(self, requests: Sequence[BoundStatement | BatchStatement]) -> list[list[Record]]:
        found: dict[int, list[Record]] = {}

        def run_rest() -> list[list[Record]]:
            rest = [index for index in range(len(requests)) if index not in found]
            errors = []
            pending = [(requests[index], None) for index in rest]
            done = execute_concurrent(
                self._session, pending, concurrency=_CONCURRENT_REQUESTS, raise_on_first_error=False
            )
            for index, (is_done, result) in zip(rest, done, strict=True):
                if is_done:
                    found[index] = list(result)
                else:
                    errors.append(result)
            if errors:
                raise next((error for error in errors if not isinstance(error, _TRANSIENT)), errors[0])
            return [found[index] for index in range(len(requests))]

        with self._errors("did not complete all requests to"):
            return self._persist(run_rest)

    def _persist(self, run: Any) -> Any:
        """Call `run` until it succeeds, for up to `_TRY_FOR_S`; returns its result."""
        deadline = time.monotonic() + _TRY_FOR_S
        while True:
            try:
                return run()
            except _TRANSIENT as error:
                if self._closed or time.monotonic() > deadline:
                    raise
                _log.info("a request to %s failed and is tried again: %s", self.name, error)
                time.sleep(_PAUSE_S)

    @contextmanager
    def _errors(self, action: str) -> Iterator[None]:
        if self._closed:
            raise StoreError(f"the store {self.name} is closed")
        try:
            yield
        except InvalidRequest as error:
            raise InputError(f"the store {self.name} can never keep this: {error}") from error
        except (DriverException, NoHostAvailable, ConnectionException) as error:
            if self._closed:
                raise StoreError(f"the store {self.name} is closed") from error
            raise StoreError(f"{action} the store {self.name}: {_describe(error)}") from error


def _cluster(address: Address) -> Cluster:
    profile = ExecutionProfile(
        load_balancing_policy=TokenAwarePolicy(DCAwareRoundRobinPolicy(address.datacenter or "")),
        consistency_level=ConsistencyLevel.LOCAL_QUORUM,
        serial_consistency_level=ConsistencyLevel.LOCAL_SERIAL,
        request_timeout=_TIMEOUT_S,
        row_factory=tuple_factory,
    )
    login = PlainTextAuthProvider(address.user, address.password) if address.user else None
    options: dict[str, Any] = {"execution_profiles": {EXEC_PROFILE_DEFAULT: profile}}
    if address.protocol_version is not None:
        options["protocol_version"] = address.protocol_version
    return Cluster(list(address.hosts), port=address.port, auth_provider=login, **options)


def _describe(error: Exception) -> str:
    if not isinstance(error, NoHostAvailable):
        return str(error)
    return "; ".join(f"{host}: {reason}" for host, reason in dict(error.errors or {}).items()) or "no node answers"


def retry_conflicts(name: str, change: Callable[[], tuple[bool, Result]]) -> Result:
    """Call `change`, which reads, decides and compares-and-sets, until it succeeds; returns its second item.

    Its first item is False if another process changed `name` after the read.
    """
    for conflicts in range(_MAX_CONFLICTS):
        is_done, result = change()
        if is_done:
            return result
        time.sleep(random.uniform(0, min(_FIRST_BACKOFF_S * 2**conflicts, _MAX_BACKOFF_S)))
    raise StoreError(f"{name} was changed by other processes {_MAX_CONFLICTS} times in a row; try again")


def _routing_key(keys: Sequence[str | bytes]) -> bytes:
    parts = [key.encode() if isinstance(key, str) else key for key in keys]
    if len(parts) == 1:
        return parts[0]
    return b"".join(len(part).to_bytes(2, "big") + part + b"\0" for part in parts)
