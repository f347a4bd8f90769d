"""Metrics for those who watch them elsewhere: TensorBoard, Weights & Biases and MLflow, where they are installed."""

import importlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from agl.errors import ConfigError

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """One of them, with a run of its own for the training."""

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files below `folder`. What an earlier process logged for `first_step` and later steps is hidden."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Raises ImportError where it is not installed."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run in project `agl`, or `$WANDB_PROJECT`. A training that is resumed goes on in the run it had."""

    def __init__(self, run: str, folder: Path, config: Mapping[str, Any]) -> None:
        wandb = _import("wandb")
        kept = folder / "wandb-run"
        settings = {"id": kept.read_text(encoding="utf-8"), "resume": "allow"} if kept.exists() else {}
        self._run = wandb.init(name=run, dir=str(folder), config=dict(config), **_project(), **settings)
        kept.write_text(self._run.id, encoding="utf-8")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """A run at `$MLFLOW_TRACKING_URI`. A training that is resumed goes on in the run it had."""

    def __init__(self, run: str, folder: Path, config: Mapping[str, Any]) -> None:
        mlflow = _import("mlflow")
        self._client: Any = mlflow.MlflowClient()
        kept = folder / "mlflow-run"
        if not kept.exists():
            experiment = mlflow.set_experiment("agl").experiment_id
            made = self._client.create_run(experiment, run_name=run)
            for name, value in _flat(config).items():
                self._client.log_param(made.info.run_id, name, value)
            kept.write_text(made.info.run_id, encoding="utf-8")
        self._run_id = kept.read_text(encoding="utf-8")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._client.log_metric(self._run_id, name.replace("@", "_at_"), value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


_LONGEST_PARAM = 500
_NAMED = {"wandb": WeightsAndBiases, "mlflow": Mlflow}


def open_trackers(
    names: Sequence[str], run: str, folder: Path, config: Mapping[str, Any], first_step: int
) -> list[Tracker]:
    """TensorBoard where it is installed, and those that `names` asks for. Raises ConfigError for one that is not."""
    found: list[Tracker] = [_NAMED[name](run, folder, config) for name in names]
    try:
        found.append(TensorBoard(folder / "tensorboard" / run, first_step))
    except ImportError:
        logger.info("tensorboard is not installed; metrics go to the store and to metrics.jsonl")
    return found


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"train.report_to names {name}, which is not installed: pip install {name}") from error


def _project() -> dict[str, str]:
    return {} if "WANDB_PROJECT" in os.environ else {"project": "agl"}


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """`config` with keys joined by dots, and values as short as MLflow takes them."""
    found: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = str(value)[:_LONGEST_PARAM]
    return found
