"""Virtual environments for packages that conflict with ours: different versions, or instrumentations of peers.

They are below build/, which git ignores. An environment is made at its first use, and again after our own requirements
have changed, because it can import the packages of our environment.
"""

import fcntl
import hashlib
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path

_ROOT = Path(__file__).parents[1]
_FOLDER = _ROOT / "build" / "venvs"
_OURS = (_ROOT / "requirements-dev.txt", *sorted((_ROOT / "packages").glob("*/pyproject.toml")))


def python_with(name: str, *requirements: str, bare: Sequence[str] = (), over_ours: bool = True) -> Path:
    """Python of the virtual environment `name`, with `requirements`, and with `bare` installed without dependencies.

    With `over_ours`, it also imports the packages of our environment that satisfy its requirements, except our own,
    which are editable. Otherwise it starts empty. Raises CalledProcessError if pip, which prints the reason, fails.
    """
    asked = repr((requirements, tuple(bare), over_ours, sys.version, sysconfig.get_path("purelib")))
    folder = _FOLDER / f"{name}-{hashlib.sha256(asked.encode()).hexdigest()[:12]}"
    python, made = folder / "bin" / "python", folder / "made-over"
    ours = "".join(path.read_text() for path in _OURS) if over_ours else ""
    _FOLDER.mkdir(parents=True, exist_ok=True)
    with _FOLDER.joinpath(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # Test processes share the folder.
        if not made.exists() or made.read_text() != ours:
            shutil.rmtree(folder, ignore_errors=True)
            venv.create(folder, symlinks=True)
            if over_ours:
                _site_packages(folder).joinpath("ours.pth").write_text(sysconfig.get_path("purelib"))
            _install(python, *requirements)
            if bare:
                _install(python, "--no-deps", *bare)
            made.write_text(ours)
    return python


def _install(python: Path, *requirements: str) -> None:
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--quiet", "--disable-pip-version-check"]
    # Compiling takes a third of the time, and of most packages tests import little.
    subprocess.run([*pip, "install", "--no-compile", *requirements], check=True)


def _site_packages(folder: Path) -> Path:
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
