"""Run the demo with several seeds: held-out reward after each phase, paired differences, wall time. Prints Markdown.

.venv/bin/python benchmarks/demo_seeds.py 0 1 2
.venv/bin/python benchmarks/demo_seeds.py --tiny 0 1 2
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from agl_trainer.report.evaluation import EvalResult, mean_interval, paired_difference

PHASES = ("base", "sft", "grpo")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", type=int, nargs="+")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    print("| seed | base | after SFT | after GRPO | SFT - base | GRPO - SFT | minutes |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for seed in arguments.seeds:
        print(_row(seed, ["--tiny"] if arguments.tiny else []), flush=True)


def _row(seed: int, options: list[str]) -> str:
    folder = Path("runs") / f"demo{''.join(options)}-seed{seed}"
    started = time.monotonic()
    agl = Path(sys.executable).with_name("agl")
    command = [str(agl), "demo", *options, "--fresh", "--json", "--seed", str(seed), "--output", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    minutes = (time.monotonic() - started) / 60
    base, sft, grpo = (EvalResult.load(folder / "eval" / f"{phase}.json").scores() for phase in PHASES)
    means = [f"{mean_interval(list(scores.values())).mean:.3f}" for scores in (base, sft, grpo)]
    gains = [paired_difference(base, sft).signed(), paired_difference(sft, grpo).signed()]
    return f"| {seed} | {' | '.join([*means, *gains])} | {minutes:.1f} |"


if __name__ == "__main__":
    main()
