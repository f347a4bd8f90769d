"""`agl serve`: collector, store and gateway in one process."""

import argparse
import signal
import threading
from contextlib import AbstractContextManager, closing, nullcontext
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from agl.cli.command import add_command
from agl.config import Config
from agl.errors import CommandError
from agl.store import Store, open_store

if TYPE_CHECKING:
    from agl.server import ServerThread

ENGINES = "agl.engines"
"""Entry point group of engines: name to `(Config, Store) -> ContextManager[ASGI app]`."""

_LOCAL = "local"


def register(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        "serve",
        run,
        "Receive spans (OTLP/HTTP), keep them in a store, and stand as a gateway in front of an OpenAI-compatible "
        "engine, until Ctrl-C.",
        "agl serve --store sqlite:///agl.db --upstream http://127.0.0.1:8000/v1",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file; without it every setting has its default")
    parser.add_argument("--store", metavar="URI", help="the store (default: as configured, else sqlite:///agl.db)")
    add_listen_options(parser)
    parser.add_argument(
        "--upstream",
        metavar="URL",
        help="engine behind the gateway, its base URL ending in /v1, or `local` for the in-process one (default: as "
        "configured, else none)",
    )


def add_listen_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8400, help="gateway and API (default: %(default)s)")
    parser.add_argument("--otlp-http-port", type=int, default=4318, help="OTLP/HTTP (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    config = Config.load(arguments.config) if arguments.config else Config()
    upstream = arguments.upstream or _configured_upstream(arguments, config)
    with (
        closing(open_store(arguments.store or config.store_uri)) as store,
        _engine(upstream, config, store) as engine,
        _server_class()(
            store,
            host=arguments.host,
            port=arguments.port,
            otlp_http_port=arguments.otlp_http_port,
            upstream=engine,
            gateway=config.gateway,
        ) as server,
    ):
        print(f"spans    {server.otlp_url}/v1/traces -> {store.uri}")
        print(f"gateway  {server.base_url}/v1 -> {upstream or 'no engine: model calls are refused (--upstream)'}")
        print("waiting for spans and model calls; Ctrl-C stops", flush=True)
        _wait_for_sigterm()
    return 0


def _server_class() -> "type[ServerThread]":
    # Imported late: the servers are an extra, and `agl serve --help` needs none.
    try:
        from agl.server import ServerThread
    except ImportError as error:
        raise CommandError(f"the servers are not installed ({error}): pip install 'agl-core[server]'") from error
    return ServerThread


def _configured_upstream(arguments: argparse.Namespace, config: Config) -> str | None:
    """None without a file, and where the file asks for the local engine but names no model for it."""
    if arguments.config is None or (config.gateway.upstream == _LOCAL and config.train is None):
        return None
    return config.gateway.upstream


def _engine(upstream: str | None, config: Config, store: Store) -> AbstractContextManager[Any]:
    if upstream == _LOCAL:
        return _local_engine(config, store)
    if upstream is not None and not upstream.startswith(("http://", "https://")):
        raise CommandError(f"the upstream is {upstream!r}, expected `local` or a base URL, http://HOST:PORT/v1")
    return nullcontext(upstream)


def _local_engine(config: Config, store: Store) -> AbstractContextManager[Any]:
    point = next(iter(entry_points(group=ENGINES, name=_LOCAL)), None)
    if point is None:
        raise CommandError(
            "the local engine is not installed: pip install agl-trainer, or name an engine with --upstream URL"
        )
    try:
        return point.load()(config, store)
    except ImportError as error:
        raise CommandError(f"the local engine cannot be loaded ({point.value}): {error}") from error


def _wait_for_sigterm() -> None:
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    stop.wait()
