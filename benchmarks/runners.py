"""Time of a GRPO step of the demo's tiny model with agents in threads of the training, or in runners. Prints Markdown.

nice -n 10 .venv/bin/python -m benchmarks.runners

Each round takes the settings in turn, each in a training of its own. The first step of each, in which runners start and
code warms up, is left out.
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from statistics import median

from agl.config import Config
from agl_trainer.loop.demo import Demo
from agl_trainer.loop.trainer import Trainer

_TIMES = ("time/rollouts_s", "time/update_s")


def config_in(folder: Path, **changes: object) -> Config:
    config = Demo.of(Path("examples/sql_agent/tiny.yaml"), folder, seed=0).config
    assert config.sft is not None
    sft = config.sft.model_copy(update={"epochs": 2})  # Enough for queries of the usual length.
    train = config.require_train().model_copy(update={"stop_after_empty_steps": 0, **changes})
    return config.model_copy(update={"train": train, "sft": sft})


def measure(tuned: Path, runners: int, steps: int) -> list[dict[str, float]]:
    """The metrics of each step but the first, after the supervised steps in the folder `tuned`."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(tuned, folder, dirs_exist_ok=True)
        with Trainer(config_in(Path(folder), runners=runners, steps=steps)).open() as trainer:
            trainer.grpo()
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["metrics"] for line in lines[-steps:]][1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    print("| round | runners | rollouts | update | load |\n|---:|---:|---:|---:|---:|", flush=True)
    taken: dict[int, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        with Trainer(config_in(Path(folder))).open() as trainer:
            trainer.sft()
        for number in range(arguments.rounds):
            for runners in (0, 1, 2):
                steps = measure(Path(folder), runners, arguments.steps)
                taken.setdefault(runners, []).extend(steps)
                print(f"| {number + 1} | {runners} | {_cells(steps)} | {os.getloadavg()[0]:.1f} |", flush=True)
    for runners, steps in taken.items():
        print(f"| all | {runners} | {_cells(steps)} | |", flush=True)


def _cells(steps: list[dict[str, float]]) -> str:
    return " | ".join(f"{median(step[name] for step in steps):.2f} s" for name in _TIMES)


if __name__ == "__main__":
    main()
