"""Experiment trackers: TensorBoard, Weights & Biases and MLflow, if installed."""

import importlib
import logging
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Protocol

from agl.errors import ConfigError

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """A tracker with one run for the training."""

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `folder`. Events of an earlier process from `first_step` on are hidden."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Raises ImportError if TensorBoard is not installed."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run in project `agl`, or `$WANDB_PROJECT`. A resumed training continues its run."""

    def __init__(self, run: str, folder: Path, config: Mapping[str, Any]) -> None:
        wandb = _import("wandb")
        run_file = folder / "wandb-run"
        settings = {"id": run_file.read_text(encoding="utf-8"), "resume": "allow"} if run_file.exists() else {}
        project = {} if "WANDB_PROJECT" in os.environ else {"project": "agl"}
        self._run = wandb.init(name=run, dir=str(folder), config=dict(config), **project, **settings)
        run_file.write_text(self._run.id, encoding="utf-8")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """A run at `$MLFLOW_TRACKING_URI`. A resumed training continues its run."""

    def __init__(self, run: str, folder: Path, config: Mapping[str, Any]) -> None:
        mlflow = _import("mlflow")
        self._client: Any = mlflow.MlflowClient()
        run_file = folder / "mlflow-run"
        if not run_file.exists():
            experiment = mlflow.set_experiment("agl").experiment_id
            new_run = self._client.create_run(experiment, run_name=run)
            for name, value in _flatten(config).items():
                self._client.log_param(new_run.info.run_id, name, value)
            run_file.write_text(new_run.info.run_id, encoding="utf-8")
        self._run_id = run_file.read_text(encoding="utf-8")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._client.log_metric(self._run_id, _mlflow_name(name), value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


_MAX_PARAM_CHARS = 500
_TRACKERS = {"wandb": WeightsAndBiases, "mlflow": Mlflow}


def open_trackers(
    names: Sequence[str], run: str, folder: Path, config: Mapping[str, Any], first_step: int
) -> list[Tracker]:
    """The trackers `names`, and TensorBoard if installed.

    Raises ConfigError if one of `names` is not installed, or cannot begin its run.
    """
    with ExitStack() as opened:
        found = [_open(name, run, folder, config, opened) for name in names]
        opened.pop_all()
    try:
        found.append(TensorBoard(folder / "tensorboard" / run, first_step))
    except ImportError:
        logger.info("tensorboard is not installed; metrics go to the store and to metrics.jsonl")
    return found


def _open(name: str, run: str, folder: Path, config: Mapping[str, Any], opened: ExitStack) -> Tracker:
    """A tracker, which `opened` closes."""
    try:
        return opened.enter_context(closing(_TRACKERS[name](run, folder, config)))
    except ConfigError:
        raise
    except Exception as error:  # the tracker is another's: any error of it must name it
        raise ConfigError(
            f"train.report_to names {name}, which cannot begin a run ({type(error).__name__}: {error}); set it up, or "
            "leave it out"
        ) from error


def _mlflow_name(name: str) -> str:
    """`name` as MLflow takes it. No slashes: its file store has `calls` in a file, `calls/trained` in a folder."""
    return re.sub(r"[^\w\- .]", "_", name.replace("@", "_at_").replace("/", "."))


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"train.report_to names {name}, which is not installed: pip install {name}") from error


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """`config` flattened, with keys joined by dots and values cut to MLflow's limit."""
    found: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= _flatten(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = str(value)[:_MAX_PARAM_CHARS]
    return found
