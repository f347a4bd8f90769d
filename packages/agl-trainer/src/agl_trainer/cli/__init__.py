"""The commands `agl train`, `agl sft`, `agl eval` and `agl demo`."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agl.cli.command import add_command, add_json_option
from agl.cli.interrupt import stops_in_order
from agl.cli.open_files import raise_file_limit
from agl.config import Config
from agl.config.section import NAME_RULE, is_name
from agl.errors import ConfigError, TrainingError
from agl_trainer.cli.doctor import demand_for

if TYPE_CHECKING:
    from agl_trainer.report.evaluation import EvalResult

EXAMPLE = Path("examples/sql_agent")
_EVALUATION = {"of": "last", "label": "eval", "against": None, "samples": 1, "pass_at": [], "success": 1.0}
"""Options of an evaluation, with their defaults."""
_STOPPING = "stopping; the same command resumes at the last checkpoint"


def train_command(subparsers: Any) -> None:
    description = (
        "Train the adapters of all roles with GRPO or rejection sampling. Resumes from the last checkpoint, if any."
    )
    parser = _add(subparsers, "train", _train, description)
    parser.add_argument(
        "--from-store",
        action="store_true",
        help="train on rollouts in the store, selected by train.traces, without running agents or an engine",
    )
    parser.add_argument(
        "--on",
        choices=("ray",),
        help="train on a Ray cluster, with runners in actors of their own (see `ray` of the configuration)",
    )
    parser.add_argument(
        "--address",
        metavar="ADDRESS",
        help="the Ray cluster; `auto`: that of this machine (default: $RAY_ADDRESS, else a Ray on this machine alone)",
    )


def sft_command(subparsers: Any) -> None:
    description = "Fine-tune the adapters of all roles on the examples or traces that the `sft` section names."
    _add(subparsers, "sft", _sft, description)


def eval_command(subparsers: Any) -> None:
    description = "Evaluate a policy on the held-out tasks, and compare it with an earlier result, paired by task."
    example = f"agl eval {EXAMPLE}/config.yaml --of best --label after --against before"
    parser = _add(subparsers, "eval", _eval, description, example)
    parser.set_defaults(**_EVALUATION)
    parser.add_argument(
        "--of",
        choices=("last", "best", "base"),
        help="policy to evaluate: last or best checkpoint (see train.eval_every), or base model (default: last)",
    )
    parser.add_argument(
        "--label", type=_label, help="name under which the result is saved in <output_dir>/eval/ (default: eval)"
    )
    parser.add_argument("--against", type=_label, metavar="LABEL", help="saved result to compare with")
    parser.add_argument("--samples", type=int, help="rollouts per task (default: 1)")
    parser.add_argument("--pass-at", type=int, nargs="+", metavar="K", help="also report pass@K")
    parser.add_argument(
        "--success", type=float, metavar="REWARD", help="minimum reward of a solved task (default: 1.0)"
    )
    parser.add_argument(
        "--compare",
        type=_label,
        metavar="LABEL",
        nargs="+",
        help="compare saved results in this order, and evaluate nothing",
    )
    add_json_option(parser)


def _label(text: str) -> str:
    if not is_name(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no label, expected {NAME_RULE}")
    return text


def demo_command(subparsers: Any) -> None:
    description = (
        "Train a LangGraph agent that writes SQL: evaluate, fine-tune on a few examples, evaluate, train with GRPO, "
        "evaluate. Stop it with Ctrl-C; the same command resumes it."
    )
    parser = add_command(subparsers, "demo", _demo, description, "agl demo --tiny")
    parser.add_argument("--tiny", action="store_true", help="use a tiny random model: one minute instead of ten")
    parser.add_argument("--output", type=Path, help="output folder (default: runs/demo or runs/demo-tiny)")
    parser.add_argument("--seed", type=int, default=0, help="seed of adapters, sampling and task order (default: 0)")
    parser.add_argument(
        "--fresh", action="store_true", help="delete an earlier run in the output folder and start again"
    )
    _add_accept_changes(parser)
    add_json_option(parser)


def _add(
    subparsers: Any, name: str, run: Callable[[argparse.Namespace], int], description: str, example: str | None = None
) -> argparse.ArgumentParser:
    parser = add_command(subparsers, name, run, description, example or f"agl {name} {EXAMPLE}/config.yaml")
    parser.add_argument("config", type=Path, help="YAML configuration file")
    _add_accept_changes(parser)
    return parser


def _add_accept_changes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="resume although the configuration or the base model changes what is trained",
    )


def _train(arguments: argparse.Namespace) -> int:
    if arguments.on == "ray":
        return _train_on_ray(arguments)
    if arguments.address is not None:
        raise ConfigError("--address names a Ray cluster: add --on ray")
    trainer = _trainer("train --from-store" if arguments.from_store else "train", arguments)
    return _run_distributed(trainer, lambda: trainer.fit(from_store=arguments.from_store))


def _train_on_ray(arguments: argparse.Namespace) -> int:
    from agl_trainer.cluster.driver import train_on_ray

    if arguments.from_store:
        raise ConfigError("--from-store runs no agents, so --on ray has nothing to place: leave it out")
    options = ("--accept-changes",) if arguments.accept_changes else ()
    return train_on_ray(arguments.config, address=arguments.address, options=options)


def _sft(arguments: argparse.Namespace) -> int:
    trainer = _trainer("sft", arguments)

    def tune() -> None:
        with trainer.open(samples=False):
            if not trainer.sft():
                raise TrainingError("no supervised step was taken")

    return _run_distributed(trainer, tune)


def _eval(arguments: argparse.Namespace) -> int:
    from agl_trainer.report.scoring import Sampling

    unused = [f"--{name.replace('_', '-')}" for name, value in _EVALUATION.items() if getattr(arguments, name) != value]
    if arguments.compare and unused:
        raise ConfigError(f"--compare evaluates nothing, so {', '.join(unused)} would have no effect; leave it out")
    train = Config.load(arguments.config).require_train()
    sampling = Sampling(arguments.samples, tuple(arguments.pass_at), arguments.success)
    sampling.check(train.eval_temperature)
    folder = Path(train.output_dir) / "eval"
    results = [_saved_result(folder, label) for label in arguments.compare or [arguments.against] if label]
    if arguments.compare:
        return _show(results, arguments)
    trainer = _trainer("eval", arguments)
    with stops_in_order("stopping"), trainer.open(resumes=arguments.of != "base", trains=False):
        if arguments.of == "best":
            trainer.take_best()
        result = trainer.evaluate(arguments.label, sampling)
    result.save(folder / f"{arguments.label}.json")
    return _show([*results, result], arguments)


def _saved_result(folder: Path, label: str) -> "EvalResult":
    from agl_trainer.report.evaluation import EvalResult

    path = folder / f"{label}.json"
    if not path.exists():
        labels = ", ".join(sorted(saved.stem for saved in folder.glob("*.json"))) or "none"
        raise TrainingError(f"{folder} has no result {label!r}; saved are: {labels}")
    return EvalResult.load(path)


def _show(results: "Sequence[EvalResult]", arguments: argparse.Namespace) -> int:
    from agl_trainer.report.evaluation import comparison_json, comparison_table

    print(comparison_json(results) if arguments.json else comparison_table(results))
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from agl_trainer.loop.demo import Demo
    from agl_trainer.report.evaluation import comparison_json

    name, config = ("demo-tiny", "tiny.yaml") if arguments.tiny else ("demo", "config.yaml")
    demo = Demo.of(EXAMPLE / config, arguments.output or Path("runs") / name, seed=arguments.seed)
    demo = replace(demo, accepts_changes=arguments.accept_changes)
    if arguments.fresh:
        demo.start_over()
    demand_for("train", demo.config)
    demand_for("sft", demo.config)
    raise_file_limit()
    with stops_in_order(_STOPPING):
        _trainer_class()
        results = demo.run()
    print(comparison_json(results) if arguments.json else demo.report(results))
    return 0


def _trainer(command: str, arguments: argparse.Namespace) -> Any:
    raise_file_limit()
    config = Config.load(arguments.config)
    demand_for(command, config)
    return _trainer_class()(config, accept_changes=arguments.accept_changes)


def _trainer_class() -> Any:
    """Imported only after the checks, because it loads torch, which takes seconds."""
    from agl_trainer.report.progress import Progress

    with Progress() as progress, progress.phase("loading PyTorch"):
        from agl_trainer.loop.trainer import Trainer
    return Trainer


def _run_distributed(trainer: Any, lead: Callable[[], None]) -> int:
    """Train in this process; if torchrun started several, the first leads and the others follow."""
    from agl_trainer.compute.devices import lead_or_follow, process_count
    from agl_trainer.loop.policy_setup import open_policy

    if process_count() > 1 and len(trainer.bases) > 1:
        raise ConfigError("torchrun spreads one base model over several devices, and `models` names several")

    def lead_until_stopped() -> None:
        with stops_in_order(_STOPPING):
            lead()

    if lead_or_follow(lead_until_stopped, lambda: open_policy(trainer.config, trainer.bases[0])):
        print(f"adapters: {trainer.folder / 'adapters'}\nmetrics:  {trainer.folder / 'metrics.jsonl'}")
    return 0
