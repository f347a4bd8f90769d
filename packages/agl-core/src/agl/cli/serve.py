"""`agl serve`: runs collector, store and gateway in one process."""

import argparse
import ctypes
import os
import signal
import threading
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from agl.canary.watch import deciding
from agl.cli.command import add_command
from agl.cli.open_files import raise_file_limit
from agl.config import Config, QueueConfig, TrafficSamplingConfig, UpstreamConfig
from agl.config.collector import TOKEN_VARIABLE
from agl.errors import CommandError
from agl.sampling import KEEP_ALL, sampling
from agl.secret_url import SecretUrl
from agl.server.auth import BearerTokens
from agl.store import Store, opened_store
from agl.store.traffic import TrafficStore
from agl.store.watchdog import watching

if TYPE_CHECKING:
    from agl.queue import SpanQueue
    from agl.server_thread import ServerThread

ENGINES = "agl.engines"
"""Entry point group for engines: name to `(Config, Store) -> ContextManager[list[EngineApp]]`."""

_LOCAL = SecretUrl("local")
_M_MMAP_THRESHOLD = -3


def register(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        "serve",
        run,
        "Receive spans by OTLP over HTTP and gRPC, keep them in a store, and run the gateway in front of an "
        "OpenAI-compatible engine, until Ctrl-C.",
        "agl serve --store sqlite:///agl.db --upstream http://127.0.0.1:8000/v1\n  agl serve --model smollm2",
    )
    add_server_options(parser)
    parser.add_argument(
        "--queue",
        type=SecretUrl,
        metavar="URI",
        help="URI of a durable queue in front of the store, redis://HOST:PORT (default: none)",
    )
    parser.add_argument(
        "--token",
        default=os.environ.get(TOKEN_VARIABLE),
        metavar="T",
        help=f"bearer token that every request must have (default: ${TOKEN_VARIABLE}, which other users cannot see; "
        "without either, none)",
    )
    engine = parser.add_mutually_exclusive_group()
    engine.add_argument(
        "--model",
        metavar="MODEL",
        help="base model to serve in this process, `smollm2` or a model folder; needs no configuration",
    )
    engine.add_argument(
        "--upstream",
        type=SecretUrl,
        metavar="URL",
        help="engine behind the gateway: a base URL that ends in /v1, or `local` for the in-process engine (default: "
        "gateway.upstream of the file, else none)",
    )


def add_server_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="YAML file (default: all settings have their defaults)")
    parser.add_argument(
        "--store",
        type=SecretUrl,
        metavar="URI",
        help="URI of the store (default: store_uri of the file, else sqlite:///agl.db)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8400, help="port of gateway, API and page (default: %(default)s)")
    parser.add_argument("--otlp-http-port", type=int, default=4318, help="port of OTLP/HTTP (default: %(default)s)")
    parser.add_argument("--otlp-grpc-port", type=int, default=4317, help="port of OTLP/gRPC (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    config = Config.load(arguments.config) if arguments.config else Config()
    if arguments.model:
        config = _with_model(config, arguments.model)
    raise_file_limit()
    _return_memory()
    chosen = arguments.upstream or (_LOCAL if arguments.model else None)
    upstream = chosen or _configured_upstream(arguments, config)
    gateway = config.gateway.model_copy(update={"engines": [] if chosen else config.routed_engines()})
    store_uri = arguments.store or config.store_uri
    with (
        opened_store(store_uri) as store,
        deciding(store),
        _queue(
            arguments.queue or config.queue_uri, store_uri, config.queue, samples=config.sampling is not None
        ) as queue,
        _engine(upstream, config, store) as engine,
        _server_class()(
            store,
            host=arguments.host,
            port=arguments.port,
            otlp_http_port=arguments.otlp_http_port,
            otlp_grpc_port=arguments.otlp_grpc_port,
            tokens=BearerTokens.read(arguments.token, config.collector.token_file),
            upstream=engine,
            collector=config.collector,
            queue=queue,
            gateway=gateway,
            allowed_hosts=config.server.allowed_hosts,
            samples=config.sampling is not None,
        ) as server,
        watching(*server.stores.values()),
        _sampling(server.stores.values(), config.sampling),
    ):
        destination = f"{queue.uri} -> {store.uri}" if queue else store.uri
        print(f"spans    {server.otlp_url}/v1/traces, {server.otlp_grpc_url} (gRPC) -> {destination}")
        engines = upstream or ", ".join(engine.url for engine in gateway.engines)
        print(f"gateway  {server.base_url}/v1 -> {engines or 'no engine: model calls are refused (--upstream)'}")
        if config.sampling is not None:
            print(f"sampling production rollouts: {config.sampling}")
        print(f"page     {server.base_url}/")
        print("waiting for spans and model calls; Ctrl-C stops", flush=True)
        _wait_for_sigterm()
    return 0


def _with_model(config: Config, model: str) -> Config:
    """`config` with the base model `model`. Raises CommandError if it has one."""
    if bases := config.bases():
        named = ", ".join(f"{base.key} {base.path}" for base in bases)
        raise CommandError(f"--model {model}: the configuration names {named}; leave out one")
    return config.model_copy(update={"train": Config.parse({"train": {"model": model}}, "--model").train})


def _server_class() -> "type[ServerThread]":
    # Imported late: the servers are an extra, which `agl serve --help` does not need.
    try:
        from agl.server_thread import ServerThread
    except ImportError as error:
        raise CommandError(f"the servers are not installed ({error}): pip install 'agl-core[server]'") from error
    return ServerThread


def _sampling(stores: Collection[Store], config: TrafficSamplingConfig | None) -> AbstractContextManager[None]:
    """The thread that decides pending rollouts. Without `config` it keeps those that are still pending, if any."""
    sampled = [store for store in stores if isinstance(store, TrafficStore)]
    if config is None and not any(store.list_pending().arrived_ns for store in sampled):
        return nullcontext()
    return sampling(sampled, config or KEEP_ALL)


@contextmanager
def _queue(
    uri: SecretUrl | None, store_uri: SecretUrl, config: QueueConfig, *, samples: bool
) -> "Iterator[SpanQueue | None]":
    """The queue at `uri`, if any, with the writers that move its spans to the store."""
    if uri is None:
        yield None
        return
    with queue_of(uri, config) as queue:
        from agl.queue import WriterPool

        with WriterPool(queue, store_uri, config, samples=samples):
            yield queue


@contextmanager
def queue_of(uri: SecretUrl, config: QueueConfig) -> "Iterator[SpanQueue]":
    """The queue at `uri`. Raises CommandError if its client is not installed, QueueError if Redis may lose spans."""
    try:
        from agl.queue import SpanQueue
    except ImportError as error:
        raise CommandError(f"the queue is not installed ({error}): pip install 'agl-core[redis]'") from error
    with closing(SpanQueue(uri, config)) as queue:
        queue.check_durability()
        yield queue


def _configured_upstream(arguments: argparse.Namespace, config: Config) -> SecretUrl | None:
    """`gateway.upstream` of the file; None if it lists engines, or if the local engine has no model (no `train`)."""
    if arguments.config is None or config.gateway.engines or (config.gateway.upstream == _LOCAL and not config.train):
        return None
    return config.gateway.upstream


def _engine(upstream: SecretUrl | None, config: Config, store: Store) -> AbstractContextManager[Any]:
    if upstream == _LOCAL:
        return _local_engine(config, store)
    if upstream is not None:
        engine_at(upstream)
    return nullcontext(upstream)


def engine_at(upstream: SecretUrl) -> UpstreamConfig:
    """The engine at the base URL `upstream`. Raises CommandError for anything else."""
    try:
        return UpstreamConfig(url=upstream)
    except ValueError:
        raise CommandError(
            f"the upstream is {upstream!r}, expected `local` or a base URL, http://HOST:PORT/v1"
        ) from None


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


def _return_memory() -> None:
    """Have the C library return blocks of 128 KiB and more to the system once they are free; bodies are such blocks.

    By default it raises this threshold with every larger block that it frees.
    """
    with suppress(OSError, AttributeError):  # Other C libraries than glibc.
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 128 * 2**10)


def _wait_for_sigterm() -> None:
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    stop.wait()
