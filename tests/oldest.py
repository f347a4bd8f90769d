"""Tests repeated with the oldest versions that a package declares. All other tests run with the newest versions."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.venv import python_with

ROOT = Path(__file__).parents[1]


def expect_to_pass(name: str, requirements: Sequence[str], files: Sequence[Path], later: Sequence[str]) -> None:
    """Run the tests of `files`, without those that match a word of `later`, in environment `name`."""
    python = python_with(name, *requirements)
    sources = os.pathsep.join(str(path) for path in sorted(ROOT.glob("packages/*/src")))
    pytest = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"not ({' or '.join(later)})"]
    done = subprocess.run(
        [*pytest, *map(str, files)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": sources},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
