"""The number of files that a training may open: each streaming rollout takes several connections."""

import resource
from pathlib import Path

import pytest

from agl.cli import main


@pytest.mark.parametrize("command", ["train", "sft"])
def test_a_training_may_open_as_many_files_as_the_system_allows(command: str, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 512), hard))
    try:
        assert main([command, str(tmp_path / "nothing.yaml")]) != 0
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
