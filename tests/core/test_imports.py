"""Who may import whom: agl stands alone, and the other three see agl only."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGES = Path(__file__).parents[2] / "packages"
ALLOWED = {
    "agl": set(),
    "agl_langchain": {"agl"},
    "agl_autogen": {"agl"},
    "agl_trainer": {"agl"},
}
HEAVY = ("torch", "transformers", "starlette", "uvicorn", "aiohttp", "sqlalchemy", "langchain_core", "autogen_core")
"""What an agent process must not pay for by `import agl`."""


def sources(package: str) -> list[Path]:
    (folder,) = PACKAGES.glob(f"*/src/{package}")
    return sorted(folder.rglob("*.py"))


def imported_packages(source: str) -> Iterator[str]:
    """Top-level packages that `source` imports anywhere, functions and TYPE_CHECKING blocks included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module.partition(".")[0]


def test_the_reader_of_imports_sees_every_kind() -> None:
    source = "import torch.nn as nn\ndef f():\n    from agl_trainer.engine import local_engine\n    from . import x\n"
    assert list(imported_packages(source)) == ["torch", "agl_trainer"]


@pytest.mark.parametrize("package", ALLOWED)
def test_import_direction(package: str) -> None:
    assert sources(package)
    forbidden = ALLOWED.keys() - ALLOWED[package] - {package}
    if package == "agl":
        forbidden = forbidden | {"torch"}
    found = {
        f"{path.relative_to(PACKAGES)} imports {name}"
        for path in sources(package)
        for name in imported_packages(path.read_text(encoding="utf-8"))
        if name in forbidden
    }
    assert not found


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


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
