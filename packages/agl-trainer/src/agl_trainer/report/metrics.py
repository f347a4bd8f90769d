"""The metrics of a run: to the store, to a JSONL file, and to trackers."""

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from agl.store import Store
from agl_trainer.report.trackers import Tracker

logger = logging.getLogger(__name__)


class MetricsLog:
    """Writes metrics of `run` to `store`, to `metrics.jsonl` in `folder`, and to `trackers`, which it closes.

    A run that starts again at `first_step` replaces what an earlier process wrote for this and later steps, and drops
    a line that a crash cut short; lines of other runs in the same file stay.
    """

    def __init__(
        self, store: Store, run: str, folder: Path, *, first_step: int = 0, trackers: Sequence[Tracker] = ()
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._store = store
        self._run = run
        path = folder / "metrics.jsonl"
        _rewind(path, run, first_step)
        self._file = path.open("a", encoding="utf-8")
        self._trackers = trackers

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep `metrics` of `step`. A value that is not finite is null in the file and absent from the store."""
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        self._store.append_metrics(self._run, step, finite)
        line = {
            "run": self._run,
            "step": step,
            "time": time.time(),
            "metrics": {name: None for name in metrics} | finite,
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.log(finite, step)

    def close(self) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


def _rewind(path: Path, run: str, first_step: int) -> None:
    """Take the lines of `run` from `first_step` on, and broken lines, out of the file at `path`."""
    if not path.exists():
        return
    kept = path.with_suffix(".jsonl.kept")
    with kept.open("w", encoding="utf-8") as file:
        file.writelines(
            text + "\n" for text, line in _whole_lines(path) if line["run"] != run or line["step"] < first_step
        )
    os.replace(kept, path)


def _whole_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """Text and value of each line of `path` that was written to its end."""
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            logger.warning("%s: left out a line that was cut short: %.60s", path, text)
        else:
            yield text, line
