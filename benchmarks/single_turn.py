"""Our GRPO and TRL's GRPOTrainer with the same task, model and number of samples. Prints Markdown.

    .venv/bin/python -m benchmarks.single_turn 0 1 2

The task is the SQL example in one turn: a question in, a query out, scored by the example's reward. For each seed, our
SFT trains SmolLM2-135M once on the gold answers. Both trainers start from that adapter (rank 16, all linear layers) and
take the same number of steps over the same tasks in the same order, with the same samples per step, temperature,
learning rate, loss and gradient clipping, in float32 on both cores. Our side runs as users run it: an agent with
OpenAI's client calls the gateway, each call becomes a span in SQLite, and the trainer reads the spans. TRL calls
only its reward function. It samples all answers of a step at once with its KV cache enabled, trains in four batches of
a quarter each without gradient checkpointing, and saves nothing. Ours saves a checkpoint after each step. The learning
rate was not tuned.

The measured time runs from the first sample to the last optimizer step, without loading and evaluation. Our engine
evaluates both final adapters with one greedy answer to each of the 96 held-out tasks. All results of a seed are kept in
`--folder`, so the same command resumes where it was stopped.
"""

import agl_trainer  # noqa: F401  # before torch, which reads how long an idle thread spins

# isort: split
import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from statistics import fmean, median
from typing import Any

from openai import OpenAI
from safetensors.torch import load_file

import agl
from agl.config import Config
from agl_trainer.loop.trainer import Trainer
from agl_trainer.model.model_folder import model_folder
from agl_trainer.report.evaluation import EvalResult, mean_interval, paired_difference
from benchmarks.single_turn_task import GROUP_SIZE, GROUPS, LEARNING_RATE, MAX_TOKENS, WEIGHTS, Took
from benchmarks.trainer import TRL
from examples.sql_agent.prompts import extract_sql, writer_messages
from examples.sql_agent.tasks import gold_examples
from tests.venv import python_with

STEPS = 8
_SOURCES = sorted((Path(__file__).parents[1] / "packages").glob("*/src"))
ROLE = "writer"


def answer(task: dict[str, Any]) -> dict[str, Any]:
    """The agent: one call, whose headers name its rollout."""
    messages: Any = writer_messages(task["question"])
    answered = _client().chat.completions.create(model=ROLE, messages=messages, extra_headers=agl.headers())
    return {"sql": extract_sql(answered.choices[0].message.content or "")}


@lru_cache(maxsize=1)
def _client() -> OpenAI:
    return OpenAI()


def examples() -> list[dict[str, Any]]:
    return [example for example in gold_examples() if example["role"] == ROLE]


def config(folder: Path, seed: int, steps: int) -> Config:
    return Config.model_validate(
        {
            "store_uri": f"sqlite:///{folder / 'agl.db'}",
            "rewards": WEIGHTS,
            "agent_roles": {ROLE: {"lora_r": 16, "lora_alpha": 32}},
            "engine": {"max_batch": 32, "max_model_len": 320},
            "train": {
                "model": "smollm2",
                "agent": "benchmarks.single_turn:answer",
                "tasks": "examples.sql_agent.tasks:train_tasks",
                "eval_tasks": "examples.sql_agent.tasks:eval_tasks",
                "reward": "examples.sql_agent.reward:score",
                "group_size": GROUP_SIZE,
                "groups_per_step": GROUPS,
                "steps": steps,
                "shuffle": False,
                "normalization": "grpo",
                "scale_rewards": "group",
                "learning_rate": LEARNING_RATE,
                "max_tokens": MAX_TOKENS,
                "timeout_s": 900,
                "seed": seed,
                "output_dir": str(folder / "run"),
            },
            "sft": {"examples": "benchmarks.single_turn:examples", "epochs": 2, "batch_size": 8, "learning_rate": 1e-3},
        }
    )


def train_ours(folder: Path, seed: int, steps: int) -> None:
    """Run SFT, then GRPO, and evaluate the adapter after each."""
    trainer = Trainer(config(folder, seed, steps))
    with trainer.open():
        trainer.sft()
        start = folder / "run" / "adapters" / trainer.session.policies.of(ROLE).version_name(ROLE)
        (folder / "start").symlink_to(start.resolve(), target_is_directory=True)
        trainer.evaluate("sft").save(folder / "sft.json")
        began, cpu_began = time.perf_counter(), time.process_time()
        trainer.grpo()
        took = Took(time.perf_counter() - began, time.process_time() - cpu_began)
        trainer.evaluate("agl").save(folder / "agl.json")
    (folder / "agl-took.json").write_text(json.dumps(asdict(took)))


def evaluate_trl(folder: Path, seed: int, steps: int) -> None:
    trainer = Trainer(config(folder, seed, steps))
    with trainer.open():
        trainer.session.policies.of(ROLE).load_adapter(
            ROLE, load_file(folder / "trl" / "adapter_model.safetensors"), 10_000
        )
        trainer.evaluate("trl").save(folder / "trl.json")


def run_seed(folder: Path, seed: int, steps: int) -> None:
    """Run the parts of a seed that are not done yet, each in a separate process."""
    if not (folder / "agl-took.json").exists():
        shutil.rmtree(folder, ignore_errors=True)  # The time of an interrupted training is unknown.
    folder.mkdir(parents=True, exist_ok=True)
    ours = [sys.executable, "-m", "benchmarks.single_turn", str(seed), "--folder", str(folder.parent)]
    ours += ["--steps", str(steps), "--only"]
    if not (folder / "agl-took.json").exists():
        subprocess.run([*ours, "agl"], check=True)
    if not (folder / "trl-took.json").exists():
        python = python_with("trl", f"trl=={TRL}")
        arguments = [str(model_folder("smollm2")), str(folder), str(seed), str(steps)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(path) for path in _SOURCES)}  # The reward's.
        subprocess.run([python, "-m", "benchmarks.single_turn_trl", *arguments], env=environment, check=True)
    if not (folder / "trl.json").exists():
        subprocess.run([*ours, "trl"], check=True)


def took(folder: Path, name: str) -> Took:
    return Took(**json.loads((folder / f"{name}-took.json").read_text()))


def row(folder: Path, seed: int) -> str:
    sft, ours, trl = (_scores(folder, label) for label in ("sft", "agl", "trl"))
    own, other = took(folder, "agl"), took(folder, "trl")
    means = [f"{fmean(scores.values()):.3f}" for scores in (sft, ours, trl)]
    ratios = [f"1/{other.wall_s / own.wall_s:.1f}", f"1/{other.cpu_s / own.cpu_s:.1f}"]
    times = [f"{own.wall_s:.0f}", f"{other.wall_s:.0f}", *ratios]
    gains = [paired_difference(*pair).signed() for pair in ((sft, ours), (sft, trl))]
    return f"| {seed} | {' | '.join([*means, *gains, *times])} |"


def print_sum(folders: list[Path]) -> None:
    """Print the difference of rewards and the ratio of times over all seeds."""
    pairs = [(_scores(folder, "agl"), _scores(folder, "trl")) for folder in folders]
    # The bootstrap resamples tasks: answers of several seeds to one task are not independent, so they are averaged.
    differences = [fmean(ours[task] - trl[task] for ours, trl in pairs) for task in pairs[0][0]]
    ratio = median(took(folder, "trl").wall_s / took(folder, "agl").wall_s for folder in folders)
    print(
        f"\nOver all seeds ours ends {mean_interval(differences).signed()} above TRL (mean, 95 % interval by task), in "
        f"1/{ratio:.1f} of its time (median)."
    )


def _scores(folder: Path, label: str) -> dict[str, float]:
    return EvalResult.load(folder / f"{label}.json").scores()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", type=int, nargs="+")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--folder", type=Path, default=Path("runs/single_turn"))
    parser.add_argument("--only", choices=("agl", "trl"), help="run one part of one seed in this process")
    arguments = parser.parse_args()
    if arguments.only and len(arguments.seeds) > 1:
        parser.error(f"--only runs one seed, and {len(arguments.seeds)} were given")
    folders = [arguments.folder.resolve() / f"seed{seed}-steps{arguments.steps}" for seed in arguments.seeds]
    if arguments.only:
        run = train_ours if arguments.only == "agl" else evaluate_trl
        run(folders[0], arguments.seeds[0], arguments.steps)
        return
    print(f"{arguments.steps} steps of {GROUPS} tasks x {GROUP_SIZE} answers; learning rate {LEARNING_RATE}.\n")
    print("| seed | after SFT | agl | TRL | agl - SFT | TRL - SFT | agl s | TRL s | wall | CPU |")
    print(f"|---:|{'---:|' * 9}")
    for folder, seed in zip(folders, arguments.seeds, strict=True):
        run_seed(folder, seed, arguments.steps)
        print(row(folder, seed), flush=True)
    print_sum(folders)


if __name__ == "__main__":
    main()
