"""npm packages for a script, in a folder below build/, which git ignores. Needs node and npm."""

import fcntl
import shutil
import subprocess
from pathlib import Path

_BUILD = Path(__file__).parents[1] / "build"


def folder_with(name: str, source: Path) -> Path:
    """Folder with the scripts of `source` and the packages of its package.json, reinstalled when that file changes."""
    folder = _BUILD / name
    folder.mkdir(parents=True, exist_ok=True)
    with (_BUILD / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # Test processes share the folder.
        wanted, installed = (source / "package.json").read_text(), folder / "installed.json"
        if not installed.exists() or installed.read_text() != wanted:
            shutil.copy(source / "package.json", folder)
            subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--loglevel=error"], cwd=folder, check=True)
            installed.write_text(wanted)
        for script in source.glob("*.js"):
            shutil.copy(script, folder)
    return folder
