"""The `agl` program. Every command is a module that is imported only when it is asked for."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points, version
from typing import Any

from agl.errors import AglError, CommandError

__all__ = ["main"]

Register = Callable[[Any], None]
"""Adds its own parser to argparse's subparsers, with `run` (parsed arguments to exit code) among its defaults."""

PLUGINS = "agl.commands"
"""Entry point group in which other packages add commands: name of the command to a `Register`."""


@dataclass(frozen=True, slots=True)
class _Command:
    entry_point: EntryPoint
    help: str

    def load(self) -> Register:
        """Import it. Raises CommandError where something it needs is not installed."""
        try:
            return self.entry_point.load()
        except (ImportError, AttributeError) as error:
            raise CommandError(
                f"the command {self.entry_point.name!r} cannot be loaded ({self.entry_point.value}): {error}"
            ) from error


_OWN: Mapping[str, str] = {
    "serve": "collector, store and gateway in one process",
    "inspect": "the tree of a rollout: roles, rewards, tokens, and what became of each model call",
    "trajectories": "training rows of rollouts, and every dropped call with its reason",
    "spans": "export and import spans as OTLP JSON lines",
    "store": "what a store holds",
    "config": "the resolved configuration",
    "doctor": "what is installed, reachable and free, and what to do where it is not",
}
"""Our commands, each the module of its name below this one, and what `agl --help` says of it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 1 (it found a problem), 2 (it cannot run), 130 (Ctrl-C)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    try:
        parsed = _parser(arguments).parse_args(arguments)
        code = parsed.run(parsed)
        sys.stdout.flush()
        return code
    except AglError as error:
        print(f"agl: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output (`head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser with the command that `arguments` ask for; the others are only listed."""
    parser = argparse.ArgumentParser(
        prog="agl",
        description="Train the agent you already have.",
        epilog="agl COMMAND --help shows an example.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=20),
    )
    parser.add_argument("--version", action="version", version=f"agl-core {version('agl-core')}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    wanted = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, command in _commands().items():
        if name == wanted:
            command.load()(subparsers)
        else:
            subparsers.add_parser(name, help=command.help)
    return parser


def _commands() -> dict[str, _Command]:
    """Plug-ins' commands and ours by name; ours come first, and win."""
    own = {
        name: _Command(EntryPoint(name, f"agl.cli.{name}:register", PLUGINS), description)
        for name, description in _OWN.items()
    }
    added = {point.name: _Command(point, f"(from {_package(point)})") for point in entry_points(group=PLUGINS)}
    return own | {name: command for name, command in sorted(added.items()) if name not in own}


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist else point.module
