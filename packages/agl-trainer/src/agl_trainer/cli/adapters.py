"""The commands `agl adapters list`, `export` and `merge`."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from agl.cli.command import add_command, add_json_option, add_verbs, print_json
from agl.cli.terminal import align
from agl.config import Config
from agl_trainer.cli.doctor import demand_for
from agl_trainer.loop.adapters import Adapter, export_adapter, find_adapters, merge_adapter, pick_adapter

_EXAMPLE = "examples/sql_agent/config.yaml"
_HEADER = ("adapter", "rank", "alpha", "parameters", "kept in")


def adapters_command(subparsers: Any) -> None:
    verbs = add_verbs(subparsers, "adapters", "List, export and merge the adapters of a training.")
    description = "List the adapters in train.output_dir by role and version."
    listing = add_command(verbs, "list", _list, description, f"agl adapters list {_EXAMPLE}")
    listing.add_argument("config", type=Path, help="YAML configuration file of the training")
    add_json_option(listing)
    _add_writer(
        verbs,
        "export",
        export_adapter,
        "Write an adapter to a folder that PeftModel.from_pretrained and vLLM can load.",
        f"agl adapters export {_EXAMPLE} writer --to adapters/writer",
    )
    _add_writer(
        verbs,
        "merge",
        merge_adapter,
        "Merge an adapter into the base model and write a model folder that needs no PEFT.",
        f"agl adapters merge {_EXAMPLE} writer@60 --to models/writer",
    )


def _add_writer(
    verbs: Any, name: str, write: Callable[[Adapter, Path, Path], None], description: str, example: str
) -> None:
    parser = add_command(verbs, name, partial(_write, write), description, example)
    parser.add_argument("config", type=Path, help="YAML configuration file of the training")
    parser.add_argument(
        "adapter", metavar="ROLE[@VERSION]", help="adapter; without a version the published one, else the newest"
    )
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="folder to create")


def _list(arguments: argparse.Namespace) -> int:
    found = find_adapters(_output_dir(Config.load(arguments.config)))
    if arguments.json:
        print_json([_to_json(adapter) for adapter in found])
    elif found:
        print("\n".join(align([_HEADER, *map(_cells, found)])))
    else:
        print(f"no adapters yet below {_output_dir(Config.load(arguments.config))}")
    return 0


def _write(write: Callable[[Adapter, Path, Path], None], arguments: argparse.Namespace) -> int:
    config = Config.load(arguments.config)
    demand_for("adapters", config)
    # Imported here because it loads torch.
    from agl_trainer.loop.policy_setup import base_folder

    adapter = pick_adapter(find_adapters(_output_dir(config)), arguments.adapter)
    write(adapter, base_folder(config, config.base_of(adapter.role)), arguments.to)
    print(f"{adapter.name}: {arguments.to}")
    return 0


def _output_dir(config: Config) -> Path:
    return Path(config.require_train().output_dir)


def _cells(adapter: Adapter) -> tuple[str, ...]:
    config = adapter.config()
    return (adapter.name, str(config["r"]), str(config["lora_alpha"]), str(adapter.count_parameters()), adapter.kept_in)


def _to_json(adapter: Adapter) -> dict[str, Any]:
    config = adapter.config()
    return {
        "role": adapter.role,
        "version": adapter.version,
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "parameters": adapter.count_parameters(),
        "kept_in": adapter.kept_in,
        "folder": str(adapter.folder),
    }
