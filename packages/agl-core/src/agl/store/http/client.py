"""The client's side: a store that another process serves."""

import json
import logging
import math
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import urllib3
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError, SSLError

from agl import otlp
from agl.errors import StoreError
from agl.server.bearer import TOKEN_VARIABLE
from agl.span import Span
from agl.store.http.verb import ERRORS, LONGEST_WAIT_S, VERBS, Verb
from agl.store.mapping import to_json
from agl.store.protocol import Collected, Resource, Store
from agl.store.rollout import Attempt, Rollout
from agl.store.span_row import SpanRow, parse
from agl.store.states import AttemptState, RolloutState

logger = logging.getLogger(__name__)

_TRY_FOR_S: Final = 30.0
"""How long a server may be away, e.g. restart, before a verb gives up."""
_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 3.0
_TIMEOUT: Final = urllib3.Timeout(connect=5.0, read=LONGEST_WAIT_S + 60)
_CONNECTIONS: Final = 32
"""Kept open; more callers at once open more."""
_OK: Final = 200
_UNAUTHORIZED: Final = 401
_BUSY: Final = (429, 503)
_LOST_BEHIND_A_PROXY: Final = (502, 504)


class _Again(Exception):
    """This try came to nothing, and another may do better, not before `after_s` seconds."""

    def __init__(self, reason: object, after_s: float = 0.0) -> None:
        super().__init__(str(reason))
        self.after_s = after_s


class HttpStore(Store):
    """The store that `agl serve` serves at `uri`, `http://HOST:PORT` or https, safe for several threads.

    The token is `https://TOKEN@HOST:PORT`, else `$AGL_TOKEN`; `self.uri` is without it. A verb goes on for 30 s while
    the server is away or asks for patience, and then raises StoreError. Where only the answer was lost it asks again
    too: verbs may be repeated. Two may not, `lease_rollout` and `collect_resources`, and raise StoreError at once: a
    lease that nobody knows of is ended by the limits of its rollout. A `finish_attempt` that is repeated raises
    TransitionError, as where another has ended the attempt.
    """

    def __init__(self, uri: str) -> None:
        self.uri, token = _take_token(uri)
        self._headers = {"authorization": f"Bearer {token}"} if token else {}
        self._pool = urllib3.PoolManager(num_pools=1, maxsize=_CONNECTIONS)
        self._closed = False

    # --- Spans -------------------------------------------------------------------------------------------------------

    def append_rows(self, rows: Sequence[SpanRow]) -> int:
        body = b"".join(row.otlp for row in rows)
        return self._result(VERBS["append_rows"], body) if rows else 0

    def query_rows(self, rollout_id: str) -> list[bytes]:
        return [row.otlp for row in parse(self._query(rollout_id)).rows]

    def query_spans(self, rollout_id: str) -> list[Span]:
        return otlp.decode(self._query(rollout_id))

    def count_spans(self) -> int:
        return self._call("count_spans")

    def last_rollout_id(self) -> str | None:
        return self._call("last_rollout_id")

    def rollout_ids(self) -> list[str]:
        return self._call("rollout_ids")

    # --- Rollouts ----------------------------------------------------------------------------------------------------

    def enqueue_rollouts(self, rollouts: Sequence[Rollout]) -> None:
        for rollout in rollouts:
            to_json(rollout.input, f"the input of rollout {rollout.rollout_id}")
            to_json(rollout.metadata, f"the metadata of rollout {rollout.rollout_id}")
        self._call("enqueue_rollouts", rollouts=rollouts)

    def lease_rollout(self, worker_id: str, rollout_id: str | None = None) -> tuple[Rollout, Attempt] | None:
        return self._call("lease_rollout", worker_id=worker_id, rollout_id=rollout_id)

    def heartbeat(self, attempt_ids: Sequence[str]) -> list[str]:
        return self._call("heartbeat", attempt_ids=attempt_ids)

    def finish_attempt(self, attempt_id: str, state: AttemptState, error: str | None = None) -> Rollout:
        return self._call("finish_attempt", attempt_id=attempt_id, state=state, error=error)

    def cancel_rollouts(self, rollout_ids: Sequence[str]) -> None:
        self._call("cancel_rollouts", rollout_ids=rollout_ids)

    def end_overdue_attempts(self, now_ns: int | None = None) -> list[Attempt]:
        return self._call("end_overdue_attempts", now_ns=now_ns)

    def wait_for_rollouts(self, rollout_ids: Sequence[str], timeout_s: float | None = None) -> list[Rollout]:
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left_s = min(LONGEST_WAIT_S, deadline - time.monotonic())
            rollouts = self._call("wait_for_rollouts", rollout_ids=rollout_ids, timeout_s=left_s)
            if all(rollout.state.is_over for rollout in rollouts) or time.monotonic() >= deadline:
                return rollouts

    def get_rollout(self, rollout_id: str) -> Rollout | None:
        return self._call("get_rollout", rollout_id=rollout_id)

    def query_rollouts(self, group_id: str) -> list[Rollout]:
        return self._call("query_rollouts", group_id=group_id)

    def query_attempts(self, rollout_id: str) -> list[Attempt]:
        return self._call("query_attempts", rollout_id=rollout_id)

    def count_rollouts(self) -> dict[RolloutState, int]:
        return self._call("count_rollouts")

    # --- Resources and metrics ---------------------------------------------------------------------------------------

    def put_resource(self, resource: Resource) -> None:
        to_json(resource.metadata, f"the metadata of {resource.name}@{resource.version}")
        self._call("put_resource", resource=resource)

    def get_resource(self, name: str, version: int | None = None) -> Resource | None:
        return self._call("get_resource", name=name, version=version)

    def lease_resource(
        self, name: str, holder: str, ttl_s: float, version: int | None = None, *, now_ns: int | None = None
    ) -> Resource | None:
        return self._call("lease_resource", name=name, holder=holder, ttl_s=ttl_s, version=version, now_ns=now_ns)

    def release_resource(self, name: str, holder: str, version: int) -> None:
        self._call("release_resource", name=name, holder=holder, version=version)

    def collect_resources(self, name: str, keep: int = 1, *, now_ns: int | None = None) -> list[Resource]:
        return self._call("collect_resources", name=name, keep=keep, now_ns=now_ns)

    def append_metrics(self, run: str, step: int, metrics: Mapping[str, float]) -> None:
        self._call("append_metrics", run=run, step=step, metrics=metrics)

    def query_metrics(self, run: str) -> dict[str, list[tuple[int, float]]]:
        return self._call("query_metrics", run=run)

    # --- Upkeep ------------------------------------------------------------------------------------------------------

    def gc(
        self, *, older_than_s: float | None = None, max_bytes: int | None = None, now_ns: int | None = None
    ) -> Collected:
        return self._call("gc", older_than_s=older_than_s, max_bytes=max_bytes, now_ns=now_ns)

    def close(self) -> None:
        self._closed = True
        self._pool.clear()

    # --- The wire ----------------------------------------------------------------------------------------------------

    def _call(self, name: str, /, **arguments: Any) -> Any:
        verb = VERBS[name]
        return self._result(verb, verb.write_arguments(arguments))

    def _query(self, rollout_id: str) -> bytes:
        verb = VERBS["query_rows"]
        return self._send(verb, verb.write_arguments({"rollout_id": rollout_id}))

    def _result(self, verb: Verb, sent: bytes | dict[str, str]) -> Any:
        return verb.read_result(self._send(verb, sent))

    def _send(self, verb: Verb, sent: bytes | dict[str, str]) -> bytes:
        """The body of the answer, whenever it comes. Raises StoreError or what ERRORS names."""
        deadline = time.monotonic() + _TRY_FOR_S
        for pause_s in _pauses():
            try:
                return self._try(verb, sent)
            except _Again as again:
                pause_s = max(pause_s, again.after_s)
                if time.monotonic() + pause_s > deadline:
                    raise StoreError(f"{self.uri} did not do {verb.name} for {_TRY_FOR_S:g} s: {again}") from again
                logger.info("%s: %s comes again in %.1f s: %s", self.uri, verb.name, pause_s, again)
            time.sleep(pause_s)
        raise AssertionError("pauses do not end")

    def _try(self, verb: Verb, sent: bytes | dict[str, str]) -> bytes:
        if self._closed:
            raise StoreError(f"the store {self.uri} is closed")
        content: dict[str, Any] = {"fields": sent}
        if isinstance(sent, bytes):
            content = {"body": sent, "headers": {**self._headers, "content-type": verb.content_type}}
        try:
            answer = self._pool.request(
                verb.method,
                self.uri + verb.path,
                **({"headers": self._headers} | content),
                retries=False,
                timeout=_TIMEOUT,
            )
        except (NewConnectionError, ConnectTimeoutError) as error:
            raise _Again(error) from error
        except HTTPError as error:
            raise self._lost(verb, error) from error
        if answer.status != _OK:
            raise self._refused(verb, answer)
        return answer.data

    def _lost(self, verb: Verb, reason: object) -> Exception:
        """No answer, and no way to know whether the verb was done."""
        if verb.is_repeatable and not isinstance(reason, SSLError):
            return _Again(reason)
        return StoreError(f"{self.uri} may or may not have done {verb.name}, its answer was lost: {reason}")

    def _refused(self, verb: Verb, answer: urllib3.BaseHTTPResponse) -> Exception:
        code, message = _read_error(answer)
        if answer.status in _BUSY:
            return _Again(message, _seconds(answer.headers.get("retry-after")))
        if answer.status in _LOST_BEHIND_A_PROXY:
            return self._lost(verb, message)
        if answer.status == _UNAUTHORIZED:
            return StoreError(f"{self.uri} does not take this token, or needs one: set {TOKEN_VARIABLE} ({message})")
        if code in ERRORS:
            return ERRORS[code][1](message)
        return StoreError(f"{self.uri} refused {verb.name} with {answer.status}: {message}")


def _take_token(uri: str) -> tuple[str, str | None]:
    """The URI without what stands before its host, and the token. Raises StoreError, without the token in it."""
    try:
        parts = urlsplit(uri)
        if not parts.hostname or parts.port == 0 or parts.query or parts.fragment:
            raise ValueError
    except ValueError:
        # From None: what urlsplit says quotes the token.
        raise StoreError("a store on another machine is http://HOST:PORT or https://HOST:PORT, nothing more") from None
    host = parts.netloc.rpartition("@")[2]
    token = unquote(parts.password or parts.username or "") or os.environ.get(TOKEN_VARIABLE, "").strip()
    return f"{parts.scheme}://{host}{parts.path.rstrip('/')}", token or None


def _pauses() -> Iterator[float]:
    """Seconds between tries: longer and longer, and not the same for all who wait."""
    pause_s = _FIRST_PAUSE_S
    while True:
        yield pause_s * random.uniform(0.5, 1.0)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _read_error(answer: urllib3.BaseHTTPResponse) -> tuple[str, str]:
    """Code and message of an error; of one that is not ours, its first words."""
    try:
        error = json.loads(answer.data)["error"]
        return str(error["code"]), str(error["message"])
    except (ValueError, KeyError, TypeError):
        return "", answer.data[:200].decode(errors="replace") or str(answer.reason)


def _seconds(retry_after: str | None) -> float:
    return float(retry_after) if retry_after and retry_after.isdecimal() else 0.0
