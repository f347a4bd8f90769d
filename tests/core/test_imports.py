"""Imports: who may import whom, no circles, and nothing heavy in `import agl`."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

PACKAGES = Path(__file__).parents[2] / "packages"
ALLOWED = {
    "agl": set(),
    "agl_langchain": {"agl"},
    "agl_autogen": {"agl"},
    "agl_trainer": {"agl"},
}
"""Each package, and the others of ours that it may import."""

ROOMS = {
    "agl": {
        "__main__": "cli",
        "cli": "server_thread runner agl canary queue sampling inspection trajectory store server config rewards "
        "secret_url otlp span semconv errors",
        "server_thread": "page collector gateway queue store server config secret_url errors",
        "page": "inspection canary trajectory store server span errors",
        "collector": "store server config errors",
        "gateway": "canary store server config context content span tokens seeds semconv errors",
        "runner": "agl rewards store config context emit content semconv errors",
        "rewards": "emit config seeds secret_url semconv errors",
        "sampling": "canary trajectory store config otlp span semconv errors",
        "canary": "trajectory store config span semconv errors",
        "queue": "store config secret_url errors",
        "inspection": "trajectory store span tokens semconv errors",
        "trajectory": "role_map span tokens semconv errors",
        "store": "server config otlp span secret_url semconv errors",
        "server": "config errors",
        "config": "secret_url errors",
        "agl": "carry tracing propagation context emit",
        "carry": "tracing propagation emit failsafe",
        "tracing": "propagation context emit content secret_url errors",
        "propagation": "context scope",
        "emit": "context scope content failsafe span semconv errors",
        "context": "scope content span semconv errors",
        "scope": "",
        "content": "failsafe semconv errors",
        "failsafe": "errors",
        "role_map": "errors",
        "secret_url": "errors",
        "otlp": "span errors",
        "span": "semconv",
        "tokens": "semconv",
        "seeds": "",
        "semconv": "",
        "errors": "",
    },
    "agl_trainer": {
        "agl_trainer": "loop",
        "losses": "algo",
        "advantages": "algo",
        "cli": "cluster loop report engine compute model rollout",
        "cluster": "engine",
        "loop": "report engine compute algo model rollout data",
        "report": "compute algo",
        "engine": "compute model data",
        "compute": "algo model data",
        "algo": "data",
        "model": "data",
        "rollout": "",
        "data": "",
    },
}
"""Each first-level folder or module of a package, from top to bottom, and the ones below it that it imports."""

HEAVY = ("torch", "transformers", "starlette", "uvicorn", "aiohttp", "sqlalchemy", "langchain_core", "autogen_core")
"""Packages that an agent process must not load by `import agl`."""


@cache
def modules() -> dict[str, Path]:
    """The file of each of our modules."""
    found = {}
    for package in ALLOWED:
        (folder,) = PACKAGES.glob(f"*/src/{package}")
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported_names(source: str, package: str = "") -> Iterator[str]:
    """Dotted names that `source` imports anywhere, functions and TYPE_CHECKING blocks included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            yield from (f"{resolve_name(name, package)}.{alias.name}" for alias in node.names)


@cache
def imports() -> dict[str, set[str]]:
    """Each of our modules, and the names that it imports; of ours those of modules."""
    found: dict[str, set[str]] = {}
    for module, path in modules().items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        names = imported_names(path.read_text(encoding="utf-8"), package)
        found[module] = {
            name.rpartition(".")[0] if top(name) in ALLOWED and name not in modules() else name for name in names
        } - {module}
    return found


def top(module: str) -> str:
    return module.partition(".")[0]


def room(module: str) -> str:
    """The first-level folder or module of a package that `module` is in; the package itself for its `__init__`."""
    return (module.split(".") + module.split("."))[1]


def test_the_reader_of_imports_sees_every_kind() -> None:
    source = "import torch.nn as nn\ndef f():\n    from agl_trainer.engine import local\n    from . import x\n"
    assert list(imported_names(source, "a.b")) == ["torch.nn", "agl_trainer.engine.local", "a.b.x"]


@pytest.mark.parametrize("package", ALLOWED)
def test_import_direction(package: str) -> None:
    forbidden = ALLOWED.keys() - ALLOWED[package] - {package}
    if package == "agl":
        forbidden = forbidden | {"torch"}
    found = {
        f"{module} imports {name}"
        for module, names in imports().items()
        for name in names
        if top(module) == package and top(name) in forbidden
    }
    assert not found


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_import_the_listed_rooms_and_no_others(package: str) -> None:
    found: dict[str, set[str]] = {}
    for module, names in imports().items():
        rooms = {room(name) for name in names if top(name) == package} - {room(module)}
        if top(module) == package and rooms:
            found.setdefault(room(module), set()).update(rooms)
    assert found == {name: set(below.split()) for name, below in ROOMS[package].items() if below}


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_are_listed_from_top_to_bottom(package: str) -> None:
    order = [*ROOMS[package]]
    arrows = [(name, below) for name, rooms in ROOMS[package].items() for below in rooms.split()]
    assert not [arrow for arrow in arrows if order.index(arrow[0]) > order.index(arrow[1])]


def test_no_modules_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter({module: names & modules().keys() for module, names in imports().items()}).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def run(code: str, text: str = "") -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=120, check=True).stdout


def test_import_agl_is_light() -> None:
    """By the modules that are loaded, which a busy machine does not change."""
    loaded = run("import sys, agl; print(*{name.partition('.')[0] for name in sys.modules})").split()
    assert "opentelemetry" in loaded
    assert not set(HEAVY) & set(loaded)
    assert not {"requests", "urllib3", "pydantic", "yaml", "google"} & set(loaded)


def test_public_names_are_listed_and_exist() -> None:
    import agl

    assert sorted(agl.__all__) == agl.__all__
    assert all(callable(getattr(agl, name)) for name in agl.__all__)
    assert {"init", "rollout", "role", "emit_reward", "operation", "headers", "flush"} <= set(agl.__all__)
