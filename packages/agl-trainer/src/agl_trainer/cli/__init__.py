"""The commands that this package adds to `agl`: train, sft, eval and demo."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agl.cli.command import add_command, add_json_option
from agl.config import Config

EXAMPLE = Path("examples/sql_agent")


def train_command(subparsers: Any) -> None:
    description = "Train the roles, with GRPO or by rejection sampling, from the last checkpoint if there is one."
    parser = _add(subparsers, "train", _train, description)
    parser.add_argument(
        "--from-store",
        action="store_true",
        help="train on rollouts that the store holds already (train.traces): no engine, no agent",
    )


def sft_command(subparsers: Any) -> None:
    _add(subparsers, "sft", _sft, "Fine-tune the roles on the examples, or the traces, of the `sft` section.")


def eval_command(subparsers: Any) -> None:
    description = (
        "Evaluate a policy on the held-out tasks, and compare it with an earlier result. Intervals are paired by task."
    )
    example = f"agl eval {EXAMPLE}/config.yaml --of best --label after --against before"
    parser = _add(subparsers, "eval", _eval, description, example)
    parser.add_argument(
        "--of",
        choices=("last", "best", "base"),
        default="last",
        help="the last checkpoint, the best one (train.eval_every), or the base model (default: last)",
    )
    parser.add_argument(
        "--label", default="eval", help="name of the result, kept in <output_dir>/eval/ (default: eval)"
    )
    parser.add_argument("--against", metavar="LABEL", help="compare with the kept result of this name")
    parser.add_argument("--samples", type=int, default=1, help="rollouts of each task (default: 1)")
    parser.add_argument("--pass-at", type=int, nargs="+", default=[], metavar="K", help="print pass@K too")
    parser.add_argument(
        "--success", type=float, default=1.0, metavar="REWARD", help="least reward that solves a task (default: 1.0)"
    )
    add_json_option(parser)


def demo_command(subparsers: Any) -> None:
    description = (
        "Train a LangGraph agent that writes SQL: evaluate, fine-tune on a few examples, evaluate, reinforce with "
        "GRPO, evaluate. Stop it with Ctrl-C; the same command goes on from there."
    )
    parser = add_command(subparsers, "demo", _demo, description, "agl demo --tiny")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model: a minute instead of ten")
    parser.add_argument("--output", type=Path, help="folder of the run (default: runs/demo or runs/demo-tiny)")
    parser.add_argument("--seed", type=int, default=0, help="seed of adapters, sampling and order (default: 0)")
    parser.add_argument("--fresh", action="store_true", help="forget an earlier run in the same folder")
    add_json_option(parser)


def _add(
    subparsers: Any, name: str, run: Callable[[argparse.Namespace], int], description: str, example: str | None = None
) -> argparse.ArgumentParser:
    parser = add_command(subparsers, name, run, description, example or f"agl {name} {EXAMPLE}/config.yaml")
    parser.add_argument("config", type=Path, help="the YAML file")
    return parser


def _train(arguments: argparse.Namespace) -> int:
    trainer = _trainer(arguments)
    return _lead(trainer, lambda: trainer.fit(from_store=arguments.from_store))


def _sft(arguments: argparse.Namespace) -> int:
    trainer = _trainer(arguments)

    def tune() -> None:
        with trainer.open(samples=False):
            trainer.sft()

    return _lead(trainer, tune)


def _eval(arguments: argparse.Namespace) -> int:
    from agl_trainer.report.evaluation import EvalResult, comparison_json, comparison_table
    from agl_trainer.report.scoring import Sampling

    trainer = _trainer(arguments)
    folder = trainer.folder / "eval"
    before = [EvalResult.load(folder / f"{arguments.against}.json")] if arguments.against else []
    sampling = Sampling(arguments.samples, tuple(arguments.pass_at), arguments.success)
    with trainer.open(resumes=arguments.of != "base"):
        if arguments.of == "best":
            trainer.take_best()
        result = trainer.evaluate(arguments.label, sampling)
    result.save(folder / f"{arguments.label}.json")
    results = [*before, result]
    print(comparison_json(results) if arguments.json else comparison_table(results))
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from agl_trainer.loop.demo import Demo
    from agl_trainer.report.evaluation import comparison_json

    name, config = ("demo-tiny", "tiny.yaml") if arguments.tiny else ("demo", "config.yaml")
    demo = Demo.of(EXAMPLE / config, arguments.output or Path("runs") / name, seed=arguments.seed)
    if arguments.fresh:
        demo.start_over()
    try:
        results = demo.run()
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on from the last step in {demo.folder}", file=sys.stderr)
        raise
    print(comparison_json(results) if arguments.json else demo.report(results))
    return 0


def _trainer(arguments: argparse.Namespace) -> Any:
    config = Config.load(arguments.config)
    # Not before the configuration is known to be right: this loads torch.
    from agl_trainer.loop.trainer import Trainer

    return Trainer(config)


def _lead(trainer: Any, lead: Callable[[], None]) -> int:
    """Train in this process, or, where torchrun started several, do what the first of them asks for."""
    from agl_trainer.compute.devices import lead_or_follow
    from agl_trainer.loop.session import open_policy

    return _say_where(trainer.folder) if lead_or_follow(lead, lambda: open_policy(trainer.config)) else 0


def _say_where(folder: Path) -> int:
    print(f"adapters: {folder / 'adapters'}\nmetrics:  {folder / 'metrics.jsonl'}")
    return 0
