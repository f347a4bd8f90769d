"""`agl config`: the configuration with all defaults."""

import argparse
from typing import Any

import yaml

from agl.cli.command import add_command, add_json_option, add_verbs, print_json
from agl.config import Config


def register(subparsers: Any) -> None:
    verbs = add_verbs(subparsers, "config", "Show the configuration.")
    show = add_command(
        verbs,
        "show",
        run_show,
        "Check a configuration file and print it with all defaults.",
        "agl config show examples/sql_agent/config.yaml",
    )
    show.add_argument("file", metavar="FILE", help="YAML file")
    add_json_option(show)


def run_show(arguments: argparse.Namespace) -> int:
    config = Config.load(arguments.file)
    if arguments.json:
        print_json(yaml.safe_load(config.to_yaml()))
    else:
        print(config.to_yaml(), end="")
    return 0
