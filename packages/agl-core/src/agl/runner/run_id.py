"""The id of the training run in an output folder."""

from pathlib import Path
from typing import Final

from agl.config.section import NAME_RULE, is_name
from agl.errors import TrainingError

RUN_FILE: Final = "run-id"


def run_of(folder: Path) -> str:
    """The id of the run in `folder`; before its first training the folder's name. Raises TrainingError for no name."""
    file = folder / RUN_FILE
    run = file.read_text(encoding="utf-8") if file.exists() else folder.resolve().name
    if not is_name(run):
        raise TrainingError(
            f"{file if file.exists() else 'train.output_dir'} names the run {run!r}, expected {NAME_RULE}; "
            "choose another train.output_dir"
        )
    return run
