"""The `agl` program. The module of a command is imported only when that command runs."""

import argparse
import errno
import gc
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points, version
from typing import Any

from agl.cli.command import Parser, help_line
from agl.cli.interrupt import INTERRUPTED
from agl.cli.terminal import LineFormatter, escaped
from agl.errors import AglError, CommandError

__all__ = ["main"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a write for which there is no room."""

Register = Callable[[Any], None]
"""Adds a command's parser to argparse's subparsers; its default `run` maps parsed arguments to an exit code."""

PLUGINS = "agl.commands"
"""Entry point group for commands of other packages: name of the command to a `Register`."""


@dataclass(frozen=True, slots=True)
class _Command:
    entry_point: EntryPoint
    help: str
    """Its line in `agl --help`; empty if it has to be loaded to know it."""

    def load(self) -> Register:
        """Import the command. Raises CommandError if that fails."""
        try:
            return self.entry_point.load()
        except Exception as error:
            raise CommandError(
                f"the command {self.entry_point.name!r} cannot be loaded ({self.entry_point.value}): {error}"
            ) from error


_OWN: Mapping[str, str] = {
    "init": "write a small example into a new folder: agent, tasks, reward and configuration",
    "serve": "run collector, store and gateway in one process",
    "runner": "run the queued rollouts of a training, on any machine",
    "inspect": "show a rollout as a tree: roles, rewards, tokens, and whether each model call trained",
    "rollouts": "list rollouts, newest first, by mode, role, reward or error, and write SFT examples",
    "trajectories": "print the training rows of rollouts, and a reason for each call that cannot train",
    "rewards": "score stored rollouts with another reward, and compare",
    "spans": "export and import spans as OTLP JSON lines",
    "canary": "give a candidate a share of production, and promote it or roll it back by evidence",
    "store": "count, delete, back up and check the contents of a store",
    "config": "check a configuration file and print it with all defaults",
    "doctor": "check packages, store, ports and engine, and say how to fix each problem",
}
"""Our commands and their help in `agl --help`. Each is the module of that name in this package."""


class _Help(argparse.HelpFormatter):
    """Keeps each command and its help on one line; argparse forgets the indentation of the longest name."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=20)
        self._action_max_length = 16


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 1 (it found a problem), 2 (it could not run), 130 (Ctrl-C)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    log = logging.StreamHandler()
    log.setFormatter(LineFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[log])
    try:
        parsed = _parser(arguments).parse_args(arguments)
        code = parsed.run(parsed)
        sys.stdout.flush()
        return code
    except AglError as error:
        print(f"agl: {escaped(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        gc.freeze()  # The interpreter ends without a last search for garbage, which takes seconds once torch is loaded.
        return INTERRUPTED
    except BrokenPipeError:  # The reader of our output, e.g. `head`, has ended.
        _drop_output()
        return 0
    except OSError as error:
        if error.errno not in _FULL:
            raise
        _drop_output()
        place = error.filename or "the output or a file"
        print(f"agl: cannot write {place}: {error.strerror}; make room, and run the command again", file=sys.stderr)
        return 2


def _drop_output() -> None:
    """What is left in the buffer would fail again when the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of the command in `arguments`; the other commands are listed in its help only.

    Without a command the plug-ins' commands are imported, for their help.
    """
    parser = Parser(
        prog="agl",
        description="Train the agent you already have.",
        epilog="agl COMMAND --help shows an example.",
        formatter_class=_Help,
    )
    parser.add_argument("--version", action="version", version=f"agl {version('agl-core')}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    wanted = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, command in _commands().items():
        if name == wanted:
            command.load()(subparsers)
        else:
            subparsers.add_parser(name, help=command.help or (_help_of_plugin(command) if wanted is None else ""))
    return parser


def _help_of_plugin(command: _Command) -> str:
    """The first sentence of its description, else its package; or the reason why it cannot be loaded."""
    alone = argparse.ArgumentParser().add_subparsers()
    point = command.entry_point
    try:
        command.load()(alone)
    except CommandError as error:
        return str(error).replace("%", "%%")
    described = alone.choices[point.name].description or ""
    return help_line(described) or f"(from {point.dist.name if point.dist else point.module})"


def _commands() -> dict[str, _Command]:
    """All commands by name. Ours come first and take precedence over a plug-in's command of the same name."""
    own = {name: _Command(EntryPoint(name, f"agl.cli.{name}:register", PLUGINS), text) for name, text in _OWN.items()}
    added = {point.name: _Command(point, "") for point in entry_points(group=PLUGINS)}
    return own | {name: command for name, command in sorted(added.items()) if name not in own}
