"""Writes the metrics of a run to the store, a JSONL file and trackers."""

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from agl.store import Store
from agl_trainer.report.trackers import Tracker

logger = logging.getLogger(__name__)


class MetricsLog:
    """Writes metrics of `run` to `store`, to `metrics.jsonl` in `folder`, and to `trackers`, which it closes.

    A run that resumes at `first_step` removes its lines from that step on, and lines that a crash left incomplete.
    Lines of other runs in the same file are kept.
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
        self._failed: list[Tracker] = []

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of `step`. A value that is not finite is null in the file and absent from the store."""
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        self._store.append_metrics(self._run, step, finite)
        line = {"run": self._run, "step": step, "time": time.time(), "metrics": dict.fromkeys(metrics) | finite}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            with self._tolerating(tracker):
                tracker.log(finite, step)

    def close(self) -> None:
        self._file.close()
        for tracker in self._trackers:
            with self._tolerating(tracker):
                tracker.close()

    @contextmanager
    def _tolerating(self, tracker: Tracker) -> Iterator[None]:
        """An error of `tracker` does not end the training; the first one is logged."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - trackers are other people's programs, on other people's servers
            if tracker not in self._failed:
                self._failed.append(tracker)
                logger.warning(
                    "%s lacks metrics: %s: %s; the training goes on, and the store and metrics.jsonl have all",
                    type(tracker).__name__,
                    type(error).__name__,
                    error,
                )


def _rewind(path: Path, run: str, first_step: int) -> None:
    """Remove the lines of `run` from `first_step` on, and incomplete lines, from the file."""
    if not path.exists():
        return
    kept = path.with_suffix(".jsonl.kept")
    with kept.open("w", encoding="utf-8") as file:
        file.writelines(
            text + "\n" for text, line in _complete_lines(path) if line["run"] != run or line["step"] < first_step
        )
    os.replace(kept, path)


def _complete_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """Text and value of each complete line of `path`."""
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            logger.warning("%s: removed an incomplete line: %.60s", path, text)
        else:
            yield text, line
