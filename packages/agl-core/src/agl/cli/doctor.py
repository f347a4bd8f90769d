"""`agl doctor`: checks everything that training needs; for each problem it says what to do."""

import argparse
import json
import platform
import socket
import tempfile
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from http.client import HTTPException
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

from agl.cli.command import add_command, add_json_option, print_json
from agl.cli.serve import ENGINES, add_server_options, engine_at, queue_of
from agl.cli.terminal import align, counted, printable
from agl.config import Config, UpstreamConfig
from agl.errors import AglError, CommandError, ConfigError
from agl.secret_url import SecretUrl
from agl.store import open_store, sqlite_path

CHECKS = "agl.checks"
"""Entry point group for checks of other packages: name to `Config -> Iterator[Check]`."""

_CORE = "agl-core"
_OURS = ("agl-langchain", "agl-autogen", "agl-trainer")
_OTHERS = ("opentelemetry-sdk", "langchain-core", "langgraph", "autogen-agentchat", "openai", "torch", "transformers")
_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the output: the subject, the finding and, if that is a problem, what to do."""

    name: str
    found: str
    todo: str = ""

    @property
    def ok(self) -> bool:
        return not self.todo


def register(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        "doctor",
        run,
        "Check versions, ports, and everything that the configuration names: store, queue, engines, model, functions, "
        "instrumentors, judge. Each check prints one line: ok, or a problem and what to do. The exit code is 1 if "
        "there is a problem.",
        "agl doctor --config config.yaml",
    )
    add_server_options(parser)
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> int:
    config = Config.load(arguments.config) if arguments.config else Config()
    checks = list(_checks(arguments, config))
    if arguments.json:
        print_json([asdict(check) | {"ok": check.ok} for check in checks])
    else:
        print("\n".join(align([_cells(check) for check in checks])))
    return 0 if all(check.ok for check in checks) else 1


def _cells(check: Check) -> tuple[str, ...]:
    text = check.found if check.ok else f"{check.found}; {check.todo}"
    return "ok" if check.ok else "problem", check.name, printable(text)


def _checks(arguments: argparse.Namespace, config: Config) -> Iterator[Check]:
    yield Check("python", platform.python_version())
    yield from _check_packages()
    yield check_store(arguments.store or config.store_uri)
    if config.queue_uri is not None:
        yield _check_queue(config.queue_uri, config)
    yield from _check_ports(arguments)
    yield from check_engines(config)
    for point in entry_points(group=CHECKS):
        yield from _check_plugin(point.name, point.load, config)


def _check_packages() -> Iterator[Check]:
    core = version(_CORE)
    yield Check(_CORE, core)
    for name in _OURS:
        found = _version(name)
        todo = "" if found in (None, core) else f"{_CORE} has version {core}: pip install {name}=={core}"
        yield Check(name, found or "not installed", todo)
    for name in _OTHERS:
        if found := _version(name):
            yield Check(name, found)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def demand(checks: Iterable[Check]) -> None:
    """Raises CommandError with a line for each problem that `checks` find."""
    if problems := [f"{check.name}: {check.found}; {check.todo}" for check in checks if not check.ok]:
        raise CommandError("\n".join(problems))


def check_folder(name: str, folder: Path, advice: str) -> Check:
    """Whether `folder` is there, or can be made, and can be written to; `advice` is what to do if not.

    It writes a file that has no name: access rights do not show whether a file system is full or takes no files.
    """
    above = next(part for part in (folder.absolute(), *folder.absolute().parents) if part.exists())
    try:
        with tempfile.TemporaryFile(dir=above, buffering=0) as file:
            file.write(b"agl")
    except OSError as error:
        return Check(name, str(folder), f"{above} cannot be written to ({error.strerror}): {advice}")
    return Check(name, str(folder))


def check_store(uri: SecretUrl) -> Check:
    """Whether the store opens or, if it is a new file, can be made."""
    try:
        path = sqlite_path(uri)
        if path is not None and not path.exists():
            todo = check_folder("store", path.parent, "choose another store with --store URI or store_uri").todo
            return Check("store", f"{uri} will be made", todo)
        with closing(open_store(uri)) as store:
            return Check("store", f"{uri} holds {counted(store.count_spans(), 'span')}")
    except AglError as error:
        return Check("store", f"{uri} does not open", str(error))


def _check_queue(uri: SecretUrl, config: Config) -> Check:
    try:
        with queue_of(uri, config.queue) as queue:
            return Check("queue", f"{queue.uri} holds {counted(queue.length(), 'span')}")
    except AglError as error:
        return Check("queue", uri, f"{error}; start Redis, or change queue_uri")


def _check_ports(arguments: argparse.Namespace) -> Iterator[Check]:
    ports = {
        "--port": arguments.port,
        "--otlp-http-port": arguments.otlp_http_port,
        "--otlp-grpc-port": arguments.otlp_grpc_port,
    }
    is_ours = _is_our_server(arguments.host, arguments.port)
    for option, port in ports.items():
        if _is_free(arguments.host, port):
            yield Check(f"port {port}", "free")
        elif is_ours:
            yield Check(f"port {port}", "in use by a running `agl serve`")
        else:
            yield Check(f"port {port}", "in use by another program", f"stop it, or choose another port with {option}")


def _is_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError:
        return False
    return True


def _is_our_server(host: str, port: int) -> bool:
    try:
        return "spans" in _get_json(f"http://{f'[{host}]' if ':' in host else host}:{port}/api/health", {})
    except (OSError, ValueError):
        return False


def check_engines(config: Config) -> list[Check]:
    """Whether each engine of the gateway answers; none if a training launches its own, or engines register."""
    engines = [base.engine for base in config.bases()]
    if engines and all(engine.launch or engine.kind == "remote" for engine in engines):
        return []
    upstream = config.gateway.upstream
    if config.gateway.engines:
        return [_check_engine(engine) for engine in config.gateway.engines]
    if upstream != "local":
        return [_check_upstream(upstream)]
    found = entry_points(group=ENGINES, name=upstream)
    todo = "" if found or config.train is None else "pip install agl-trainer, or set gateway.upstream to a URL"
    return [Check("engine", "local" if found else "local, not installed", todo)]


def _check_upstream(upstream: SecretUrl) -> Check:
    try:
        return _check_engine(engine_at(upstream))
    except CommandError as error:
        return Check("engine", upstream, f"correct gateway.upstream: {error}")


def _check_engine(engine: UpstreamConfig) -> Check:
    url = f"{engine.base_url}/models"
    try:
        models = [str(model.get("id")) for model in _get_json(url, engine.authorization())["data"]]
    except ConfigError as error:
        return Check("engine", engine.url, f"set the variable: {error}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        todo = f"start it, or correct its URL in gateway.upstream or gateway.engines ({error})"
        return Check("engine", f"{url} does not answer", todo)
    return Check("engine", f"{engine.url} serves {', '.join(models)}")


def _get_json(url: str, headers: dict[str, str]) -> Any:
    """The answer of the server at `url`. Raises OSError or ValueError if it is none, or no JSON."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S) as response:
            return json.load(response)
    except HTTPException as error:
        raise OSError(f"what listens there does not speak HTTP: {error!r}") from error


def _check_plugin(name: str, load: Callable[[], Any], config: Config) -> Iterator[Check]:
    try:
        yield from load()(config)
    except Exception as error:  # noqa: BLE001 - a broken plug-in must not prevent the other checks
        found = f"the check itself failed: {type(error).__name__}: {error}"
        yield Check(name, found, "reinstall the package that it belongs to")
