"""The client: a store that another process serves."""

import json
import logging
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from inspect import signature
from typing import Any, Final, TypeVar, cast
from urllib.parse import urlsplit

import urllib3
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError, SSLError

from agl import otlp
from agl.config.collector import TOKEN_VARIABLE
from agl.config.section import DEFAULT_PROJECT
from agl.errors import RefusedError, StoreError
from agl.secret_url import SecretUrl
from agl.span import Span
from agl.store.http.verb import ERRORS, MAX_WAIT_S, VERBS, Verb
from agl.store.mapping import to_json
from agl.store.project import split_project
from agl.store.protocol import Resource, Store
from agl.store.rollout import Rollout
from agl.store.span_row import SpanRow, parse

logger = logging.getLogger(__name__)

_TRY_FOR_S: Final = 30.0
"""How long a verb retries, e.g. while the server restarts."""
_FIRST_PAUSE_S: Final = 0.1
_MAX_PAUSE_S: Final = 3.0
_TIMEOUT: Final = urllib3.Timeout(connect=5.0, read=MAX_WAIT_S + 60)
_CONNECTIONS: Final = 32
"""Connections to keep open; more concurrent callers open more."""
_OK: Final = 200
_UNAUTHORIZED: Final = 401
_BUSY: Final = (429, 503)
_SERVER_ERRORS: Final = 500
_PROXY_ERRORS: Final = (502, 504)


class _RetryableError(Exception):
    """The request failed, and a retry may succeed after `after_s` seconds."""

    def __init__(self, reason: object, after_s: float = 0.0) -> None:
        super().__init__(str(reason))
        self.after_s = after_s


Function = TypeVar("Function", bound=Callable[..., Any])


def _remote(function: Function) -> Function:
    """A method of `HttpStore` that performs a verb of the protocol on the server."""
    parameters = signature(function)

    @wraps(function)
    def call(self: "HttpStore", *args: Any, **kwargs: Any) -> Any:
        bound = parameters.bind(self, *args, **kwargs)
        bound.apply_defaults()
        _, *arguments = bound.arguments.items()
        return self._call(function.__name__, dict(arguments))

    return cast(Function, call)


class HttpStore(Store):
    """The store that `agl serve` serves at `uri`, `http://HOST:PORT` or https, safe for several threads.

    The token is that of `https://TOKEN@HOST:PORT`, else `$AGL_TOKEN`; `self.uri` is without it. The project is that of
    the token. A verb retries for 30 s
    while the server is down or busy, and then raises StoreError. It also retries if only the response was lost: verbs
    may be repeated, except `lease_rollout` and `collect_resources`, which raise StoreError at once. (The limits of its
    rollout end a lease whose response was lost.) A `finish_attempt` that is repeated after it succeeded raises
    TransitionError, as if another caller had ended the attempt.
    """

    query_rows_by_rollout = _remote(Store.query_rows_by_rollout)
    count_spans = _remote(Store.count_spans)
    last_rollout_id = _remote(Store.last_rollout_id)
    rollout_ids = _remote(Store.rollout_ids)
    list_rollouts = _remote(Store.list_rollouts)
    lease_rollout = _remote(Store.lease_rollout)
    heartbeat = _remote(Store.heartbeat)
    finish_attempt = _remote(Store.finish_attempt)
    cancel_rollouts = _remote(Store.cancel_rollouts)
    end_overdue_attempts = _remote(Store.end_overdue_attempts)
    get_rollouts = _remote(Store.get_rollouts)
    query_rollouts = _remote(Store.query_rollouts)
    query_attempts = _remote(Store.query_attempts)
    count_rollouts = _remote(Store.count_rollouts)
    get_resource = _remote(Store.get_resource)
    query_resources = _remote(Store.query_resources)
    lease_resource = _remote(Store.lease_resource)
    release_resource = _remote(Store.release_resource)
    collect_resources = _remote(Store.collect_resources)
    put_resource_part = _remote(Store.put_resource_part)
    get_resource_part = _remote(Store.get_resource_part)
    append_metrics = _remote(Store.append_metrics)
    query_metrics = _remote(Store.query_metrics)
    damaged_rows = _remote(Store.damaged_rows)
    gc = _remote(Store.gc)

    def __init__(self, uri: str) -> None:
        url, project = split_project(uri)
        if project != DEFAULT_PROJECT:
            raise StoreError(f"{url} is a server, whose token decides the project: pass a token of {project!r} to it")
        self.uri, token = _split_token(url)
        self._headers = {"authorization": f"Bearer {token}"} if token else {}
        self._pool = urllib3.PoolManager(num_pools=1, maxsize=_CONNECTIONS)
        self._closed = False

    def append_rows(self, rows: Sequence[SpanRow]) -> int:
        verb = VERBS["append_rows"]
        return verb.read_result(self._send(verb, b"".join(row.otlp for row in rows))) if rows else 0

    def query_rows(self, rollout_id: str) -> list[bytes]:
        return [row.otlp for row in parse(self._query(rollout_id)).rows]

    def query_spans(self, rollout_id: str) -> list[Span]:
        return otlp.decode(self._query(rollout_id))

    def enqueue_rollouts(self, rollouts: Sequence[Rollout]) -> None:
        for rollout in rollouts:
            to_json(rollout.input, f"the input of rollout {rollout.rollout_id}")
            to_json(rollout.metadata, f"the metadata of rollout {rollout.rollout_id}")
        self._call("enqueue_rollouts", {"rollouts": rollouts})

    def wait_for_rollouts(self, rollout_ids: Sequence[str], timeout_s: float | None = None) -> list[Rollout]:
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left_s = min(MAX_WAIT_S, deadline - time.monotonic())
            rollouts = self._call("wait_for_rollouts", {"rollout_ids": rollout_ids, "timeout_s": left_s})
            if all(rollout.state.is_over for rollout in rollouts) or time.monotonic() >= deadline:
                return rollouts

    def put_resource(self, resource: Resource) -> None:
        self._write_resource("put_resource", resource)

    def add_resource(self, resource: Resource) -> Resource:
        return self._write_resource("add_resource", resource)

    def close(self) -> None:
        self._closed = True
        self._pool.clear()

    # --- Requests ----------------------------------------------------------------------------------------------------

    def _call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        verb = VERBS[name]
        return verb.read_result(self._send(verb, verb.write_arguments(arguments)))

    def _write_resource(self, verb: str, resource: Resource) -> Any:
        to_json(resource.metadata, f"the metadata of {resource.name}@{resource.version}")
        return self._call(verb, {"resource": resource})

    def _query(self, rollout_id: str) -> bytes:
        verb = VERBS["query_rows"]
        return self._send(verb, verb.write_arguments({"rollout_id": rollout_id}))

    def _send(self, verb: Verb, arguments: bytes | dict[str, str]) -> bytes:
        """Body of the response, after retries. Raises StoreError or an error of ERRORS."""
        deadline = time.monotonic() + _TRY_FOR_S
        for pause_s in _pauses():
            try:
                return self._send_once(verb, arguments)
            except _RetryableError as error:
                pause_s = max(pause_s, error.after_s)
                if time.monotonic() + pause_s > deadline:
                    raise StoreError(f"{self.uri} did not do {verb.name} for {_TRY_FOR_S:g} s: {error}") from error
                logger.info("%s: %s is retried in %.1f s: %s", self.uri, verb.name, pause_s, error)
            time.sleep(pause_s)
        raise AssertionError("unreachable: _pauses is endless")

    def _send_once(self, verb: Verb, arguments: bytes | dict[str, str]) -> bytes:
        if self._closed:
            raise StoreError(f"the store {self.uri} is closed")
        content: dict[str, Any] = {"fields": arguments, "headers": self._headers}
        if isinstance(arguments, bytes):
            content = {"body": arguments, "headers": {**self._headers, "content-type": verb.content_type}}
        try:
            url = self.uri + verb.path
            response = self._pool.request(verb.method, url, **content, retries=False, timeout=_TIMEOUT)
        except (NewConnectionError, ConnectTimeoutError) as error:
            raise _RetryableError(error) from error
        except HTTPError as error:
            raise self._lost_response(verb, error) from error
        if response.status != _OK:
            raise self._error(verb, response)
        return response.data

    def _lost_response(self, verb: Verb, reason: object) -> Exception:
        """The error for a request of which nobody knows whether the server processed it."""
        if verb.is_repeatable and not isinstance(reason, SSLError):
            return _RetryableError(reason)
        return StoreError(f"{self.uri} may or may not have done {verb.name}, its response was lost: {reason}")

    def _error(self, verb: Verb, response: urllib3.BaseHTTPResponse) -> Exception:
        code, message = _read_error(response)
        if response.status in _BUSY:
            return _RetryableError(message, _seconds(response.headers.get("retry-after")))
        if response.status in _PROXY_ERRORS:
            return self._lost_response(verb, message)
        if response.status == _UNAUTHORIZED:
            return RefusedError(f"{self.uri} does not take this token, or needs one: set {TOKEN_VARIABLE} ({message})")
        if code in ERRORS:
            return ERRORS[code][1](message)
        refused = RefusedError if response.status < _SERVER_ERRORS else StoreError
        return refused(f"{self.uri} refused {verb.name} with {response.status}: {message}")


def _split_token(uri: SecretUrl) -> tuple[str, str | None]:
    """The URI without user and password, and the token. Raises StoreError, without the token in it."""
    try:
        parts = urlsplit(uri.without_login)
        if not parts.hostname or parts.port == 0 or parts.query or parts.fragment:
            raise ValueError
    except ValueError:
        # From None: the message of urlsplit quotes the token.
        raise StoreError("a store on another machine is http://HOST:PORT or https://HOST:PORT, nothing more") from None
    user, password = uri.login or ("", "")
    return uri.without_login.rstrip("/"), password or user or os.environ.get(TOKEN_VARIABLE, "").strip() or None


def _pauses() -> Iterator[float]:
    """Seconds between retries: exponential backoff with jitter."""
    pause_s = _FIRST_PAUSE_S
    while True:
        yield pause_s * random.uniform(0.5, 1.0)
        pause_s = min(2 * pause_s, _MAX_PAUSE_S)


def _read_error(response: urllib3.BaseHTTPResponse) -> tuple[str, str]:
    """Code and message of an error response; an empty code and the first 200 bytes if it is not from `agl serve`."""
    try:
        error = json.loads(response.data)["error"]
        return str(error["code"]), str(error["message"])
    except (ValueError, KeyError, TypeError):
        return "", response.data[:200].decode(errors="replace") or str(response.reason)


def _seconds(retry_after: str | None) -> float:
    return float(retry_after) if retry_after and retry_after.isdecimal() else 0.0
