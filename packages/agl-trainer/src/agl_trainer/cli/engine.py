"""`agl engine`: a vLLM server for a training that runs on another machine."""

import argparse
import logging
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from pydantic import SecretStr

from agl.cli.command import add_command, add_waits
from agl.cli.interrupt import on_signals
from agl.config import Base, Config, LaunchConfig, UpstreamConfig
from agl.errors import CommandError, ConfigError
from agl.runner.run_id import run_of
from agl.secret_url import SecretUrl
from agl.server.auth import is_loopback
from agl.store import open_store

if TYPE_CHECKING:
    from agl_trainer.engine.vllm.launch import RunningVllm
    from agl_trainer.engine.vllm.registry import Wanted

_LOOPBACK: Final = "127.0.0.1"
_EVERYWHERE: Final = ("0.0.0.0", "::")


def engine_command(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        "engine",
        run,
        "Run a vLLM server for a training on another machine (engine.kind: remote), or join one that runs: fetch the "
        "adapters from the store, load and unload them. SIGTERM or Ctrl-C drains: running calls end first.",
        "agl engine examples/sql_agent/config.yaml --store http://trainer:8400 --host 0.0.0.0",
    )
    parser.add_argument("config", type=Path, help="YAML configuration file, that of the training")
    parser.add_argument("--store", type=SecretUrl, metavar="URI", help="URI of the store (default: store_uri)")
    parser.add_argument("--run", dest="training", metavar="NAME", help="the training (default: of train.output_dir)")
    parser.add_argument("--model", metavar="NAME", help="of `models`, if several have remote engines")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--url", type=SecretUrl, help="join the vLLM server at this base URL (default: start one, by engine.launch)"
    )
    chosen.add_argument("--host", default=_LOOPBACK, help="where vLLM listens (default: %(default)s)")
    parser.add_argument(
        "--address", metavar="HOST", help="where the training reaches vLLM (default: by the route to the store)"
    )
    parser.add_argument("--folder", type=Path, help="folder for adapters and vLLM's log (default: a temporary one)")
    add_waits(parser, drain_s=60, running="calls", missing="training, store or vLLM")


def run(arguments: argparse.Namespace) -> int:
    from agl_trainer.engine.vllm.keeper import EngineKeeper, Patience, await_training
    from agl_trainer.engine.vllm.registry import fleet_name
    from agl_trainer.engine.vllm.server import VllmServer

    logging.getLogger("agl_trainer.engine.vllm.keeper").setLevel(logging.INFO)
    config = Config.load(arguments.config)
    base = _base(config, arguments.model)
    _check_url(arguments.url)
    training = arguments.training or run_of(Path(config.require_train().output_dir))
    key, store_uri = base.engine.key(), arguments.store or config.store_uri
    fleet = fleet_name(training, base)
    with ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="agl-engine-")))
        _check_folder(folder)
        store = stack.enter_context(closing(open_store(store_uri)))
        wanted = await_training(store, fleet, Patience(arguments.patience))
        url, check = arguments.url, lambda: None
        if url is None:
            vllm = stack.enter_context(_launched(config, base, wanted, key, arguments.host, folder / "vllm.log"))
            url, check = SecretUrl(vllm.url), vllm.check
        server = VllmServer(url.without_login, {"authorization": f"Bearer {key}"} if key else {})
        address = _address(arguments, url, store_uri)
        keeper = EngineKeeper(
            store,
            fleet,
            stack.enter_context(server),
            address,
            folder / "adapters",
            lease_s=base.engine.lease_s,
            patience_s=arguments.patience,
            check=check,
        )
        print(f"engine {address}: for {training} in {store.uri}; Ctrl-C or SIGTERM drains", flush=True)
        on_signals(keeper.stop)
        keeper.work(arguments.drain)
    return 0


def _base(config: Config, name: str | None) -> Base:
    """The base model of the engine. Raises ConfigError if it is not known, or its engines are not remote."""
    config.require_train()
    remote = {base.name: base for base in config.bases() if base.engine.kind == "remote"}
    if not remote:
        raise ConfigError("no engine of this configuration is remote: set engine.kind, here and for the training")
    if name is None and len(remote) == 1:
        return next(iter(remote.values()))
    if name not in remote:
        raise CommandError(f"--model is {name}; engines of these base models are remote: {', '.join(remote)}")
    return remote[name]


def _check_url(url: SecretUrl | None) -> None:
    """Raises CommandError if an engine cannot be joined there."""
    if url is None:
        return
    try:
        UpstreamConfig(url=url)
    except ValueError:
        raise CommandError(f"--url is {url}, expected a base URL, http://HOST:PORT/v1") from None
    if url.login:
        raise CommandError(f"--url {url} has a user, which the training does not know: set engine.key_env to its key")


def _check_folder(folder: Path) -> None:
    """Raises CommandError if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise CommandError(f"cannot write to --folder {folder}: {error.strerror}; name another") from error


@contextmanager
def _launched(config: Config, base: Base, wanted: "Wanted", key: str, host: str, log: Path) -> Iterator["RunningVllm"]:
    """A vLLM server here, with the training's base model. Raises ConfigError if the model here is another one."""
    from agl_trainer.engine.vllm.launch import free_port, running_vllm
    from agl_trainer.loop.engines import vllm_command
    from agl_trainer.loop.policy_setup import fingerprint_of

    if not is_loopback(host) and not key:
        raise ConfigError(
            f"others can reach vLLM at --host {host}: set engine.key_env to a variable that has its API key, here and "
            "for the training"
        )
    here = fingerprint_of(config, base)
    if different := [part for part, digest in wanted.base.items() if here.get(part) != digest]:
        raise ConfigError(
            f"{base.key} {base.path} is another model here than where the training runs: its "
            f"{' and '.join(different)} differ; use the same model in the same revision"
        )
    launch = base.engine.launch or LaunchConfig()
    if key:
        launch = launch.model_copy(update={"environment": {**launch.environment, "VLLM_API_KEY": SecretStr(key)}})
    port = launch.port or free_port()
    own = _LOOPBACK if host in _EVERYWHERE else host
    print(f"waiting for vLLM to load the model (its log is {log})", flush=True)
    with running_vllm(vllm_command(config, base, launch, port, host), launch, port, log, lambda: None, own) as vllm:
        yield vllm


def _address(arguments: argparse.Namespace, url: SecretUrl, store_uri: SecretUrl) -> str:
    """The engine's base URL for the training."""
    parts = urlsplit(url.without_login.rstrip("/"))
    host = parts.hostname or _LOOPBACK
    listens = host if arguments.url else arguments.host
    if arguments.address:
        host = arguments.address
    elif listens in _EVERYWHERE or (arguments.url and is_loopback(host)):
        host = _route_to(store_uri)
    port = f":{parts.port}" if parts.port else ""
    return parts._replace(netloc=f"[{host}]{port}" if ":" in host else f"{host}{port}").geturl()


def _route_to(store_uri: SecretUrl) -> str:
    """The address of this machine on the route to the store; loopback for a store on this machine."""
    store_host = (urlsplit(store_uri.without_login).hostname or "").partition(",")[0]
    if not store_host:
        return _LOOPBACK
    try:
        family, kind, *_, address = socket.getaddrinfo(store_host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise CommandError(f"there is no route to {store_host} ({error}): name --address") from error
