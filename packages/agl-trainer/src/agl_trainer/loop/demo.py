"""A whole training: evaluate the base model, fine-tune on examples, evaluate, train with GRPO, evaluate."""

import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from agl.config import Config
from agl.errors import ConfigError
from agl.runner.run_id import run_of
from agl.secret_url import SecretUrl
from agl.store import opened_store
from agl_trainer.loop.output_folder import locked
from agl_trainer.report.curve import save_curve, terminal_curve
from agl_trainer.report.evaluation import EvalResult, comparison_table

if TYPE_CHECKING:
    from agl_trainer.loop.trainer import Trainer

_CURVE = "mean reward of the rollouts of each GRPO step, smoothed over 5 steps"


@dataclass(frozen=True, slots=True)
class Demo:
    """A training of an example in one folder. It resumes where it was stopped."""

    config: Config
    folder: Path
    accepts_changes: bool = False
    """It resumes although the example, or its seed, has changed."""

    @classmethod
    def of(cls, config_path: Path, folder: Path, *, seed: int) -> Self:
        """The example of `config_path`, with store and checkpoints in `folder`. Raises ConfigError."""
        if not config_path.exists():
            raise ConfigError(f"{config_path} does not exist; run the demo from the folder of the project")
        config = Config.load(config_path)
        train = config.require_train().model_copy(update={"output_dir": str(folder), "seed": seed})
        store_uri = SecretUrl(f"sqlite:///{folder / 'agl.db'}")
        return cls(config.model_copy(update={"train": train, "store_uri": store_uri}), folder)

    def start_over(self) -> None:
        """Remove the folder of an earlier run. Raises TrainingError if that still runs."""
        with locked(self.folder):
            shutil.rmtree(self.folder, ignore_errors=True)

    def run(self) -> list[EvalResult]:
        """Run the remaining phases; returns the evaluations `base`, `sft` and `grpo`."""
        from agl_trainer.loop.trainer import Trainer  # It loads torch.

        trainer = Trainer(self.config, accept_changes=self.accepts_changes)
        with trainer.open():
            base = self._evaluated(trainer, "base")
            trainer.sft()
            sft = self._evaluated(trainer, "sft")
            trainer.grpo()
            grpo = self._evaluated(trainer, "grpo")
        return [base, sft, grpo]

    def report(self, results: Sequence[EvalResult]) -> str:
        """Table, reward curve, and further commands; also saves the curve as PNG if matplotlib is installed."""
        with opened_store(self.config.store_uri) as store:
            metrics = store.query_metrics(run_of(self.folder))
        # A run counts on from its supervised steps.
        before = min((step for step, _ in metrics.get("learning_rate", [])), default=1) - 1
        points = [(step - before, value) for step, value in metrics.get("reward/mean", [])]
        curve = self.folder / "reward.png"
        levels = {f"{result.label}, held out": sum(result.scores().values()) / len(result.tasks) for result in results}
        with suppress(ConfigError):
            save_curve(curve, {"training reward": points}, title=_CURVE, levels=levels)
        lines = [comparison_table(results), "", _CURVE, terminal_curve(points), ""]
        if curve.exists():
            lines.append(f"curve     {curve}")
        lines += [
            f"store     {self.config.store_uri}",
            f"adapters  {self.folder / 'adapters'}",
            "",
            "to look further:",
            f"  agl inspect --last --store {self.config.store_uri}",
            f"  agl trajectories --last --store {self.config.store_uri} --json",
            f"  tensorboard --logdir {self.folder / 'tensorboard'}",
        ]
        return "\n".join(lines)

    def _evaluated(self, trainer: "Trainer", label: str) -> EvalResult:
        """The saved result of `label`, or a new one of the current weights."""
        path = self.folder / "eval" / f"{label}.json"
        if path.exists():
            return EvalResult.load(path)
        result = trainer.evaluate(label)
        result.save(path)
        return result
