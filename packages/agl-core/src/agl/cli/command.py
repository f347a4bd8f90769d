"""Parts that several commands share: parsers, options for the store and rollouts, and JSON output."""

import argparse
import difflib
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from agl import otlp
from agl.cli.terminal import json_text
from agl.config import DEFAULT_STORE_URI
from agl.errors import CommandError
from agl.secret_url import SecretUrl
from agl.span import Span
from agl.store import Store, opened_store, sqlite_path

_HELP_WIDTH = 78
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


class Parser(argparse.ArgumentParser):
    """Names an unknown option, where argparse would take its value for an argument and complain of that."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        for argument in sys.argv[1:] if args is None else args:
            name = argument.partition("=")[0]
            if argument == "--" or (self._subparsers is not None and not argument.startswith("-")):
                break  # Only arguments follow, or what a subparser reads.
            known = self._option_string_actions
            if re.fullmatch(r"--?[a-zA-Z]\S*", name) and not any(option.startswith(name) for option in known):
                close = difflib.get_close_matches(name, known, n=1)
                self.error(f"there is no option {name}" + (f"; did you mean {close[0]}?" if close else ""))
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Does not show the password of a URL in the wrong place."""
        super().error(" ".join(SecretUrl.shown(word) if "@" in word else word for word in message.split(" ")))


def add_command(
    subparsers: Any, name: str, run: Callable[[argparse.Namespace], int], description: str, example: str
) -> argparse.ArgumentParser:
    """Add a parser for the command or verb `name`, which calls `run` and shows `example` in its help.

    The first sentence of `description` is its line in the list of commands.
    """
    parser = subparsers.add_parser(
        name,
        help=help_line(description),
        description=textwrap.fill(description, _HELP_WIDTH),
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def help_line(description: str) -> str:
    """The first sentence of `description`, as the line of a command in a list."""
    first = " ".join(description.split()).split(". ")[0].removesuffix(".").replace("%", "%%")
    return first[:1].lower() + first[1:]


def add_verbs(subparsers: Any, name: str, description: str) -> Any:
    """Add a parser for the command `name`, and return the subparsers of its verbs."""
    parser = subparsers.add_parser(name, help=help_line(description), description=description)
    return parser.add_subparsers(title="verbs", metavar="VERB", required=True)


def add_store_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--store",
        type=SecretUrl,
        metavar="URI",
        default=DEFAULT_STORE_URI,
        help=f"URI of the store (default: {DEFAULT_STORE_URI})",
    )


def add_json_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_rollout_options(parser: argparse.ArgumentParser) -> None:
    """`--rollout`, `--group` or `--last`, of which one is required."""
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--rollout", metavar="ID", action="append", help="a rollout; may be repeated")
    chosen.add_argument("--group", metavar="ID", help="all queued rollouts of this group")
    chosen.add_argument("--last", action="store_true", help="the rollout of the span that arrived last")


@contextmanager
def existing_store(uri: SecretUrl) -> Iterator[Store]:
    """The store at `uri`. Raises CommandError if it does not exist, and does not create it."""
    sqlite_file(uri)
    with opened_store(uri) as store:
        yield store


def sqlite_file(uri: SecretUrl) -> Path | None:
    """The file of a SQLite store; None for other stores. Raises CommandError if it does not exist."""
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        raise CommandError(f"there is no store at {path.absolute()}; {_nearby_stores()}")
    return path


def rows_of_rollouts(arguments: argparse.Namespace, store: Store) -> list[list[bytes]]:
    """Spans, as OTLP, of each rollout that the options select. Raises CommandError if there are none."""
    if arguments.group:
        return _rows_of_group(arguments.group, store)
    rollout_ids = [last_rollout_id(store)] if arguments.last else arguments.rollout
    return [_rows_of(rollout_id, store) for rollout_id in rollout_ids]


def spans_of_rollouts(arguments: argparse.Namespace, store: Store) -> list[list[Span]]:
    """Spans of each rollout that the options select. Raises CommandError if there are none."""
    return [otlp.decode(b"".join(rows)) for rows in rows_of_rollouts(arguments, store)]


def spans_of(rollout_id: str, store: Store) -> list[Span]:
    """Spans of a rollout. Raises CommandError if there are none."""
    return otlp.decode(b"".join(_rows_of(rollout_id, store)))


def _rows_of(rollout_id: str, store: Store) -> list[bytes]:
    rows = store.query_rows(rollout_id)
    if not rows:
        last = store.last_rollout_id()
        hint = f"; the last one there is {last}" if last else ", and no other spans"
        raise CommandError(f"{store.uri} holds no span of rollout {rollout_id!r}{hint}")
    return rows


def last_rollout_id(store: Store) -> str:
    """Rollout of the span that arrived last. Raises CommandError if the store is empty."""
    last = store.last_rollout_id()
    if last is None:
        raise CommandError(f"{store.uri} holds no spans yet")
    return last


def seconds(text: str) -> float:
    """Argument type of a time such as `7d`. Raises ArgumentTypeError."""
    return parse_amount(text, r"(\d+(?:\.\d+)?)([smhdw])", _SECONDS, "a time such as 7d, 12h or 30m")


def add_waits(parser: argparse.ArgumentParser, *, drain_s: int, running: str, missing: str) -> None:
    """Add `--drain`, how long to wait for what is `running`, and `--patience`, how long without what is `missing`."""
    parser.add_argument(
        "--drain",
        type=_short_time,
        default=float(drain_s),
        metavar="TIME",
        help=f"longest wait for running {running} (default: {drain_s}s)",
    )
    parser.add_argument(
        "--patience",
        type=_short_time,
        default=300.0,
        metavar="TIME",
        help=f"longest time without {missing} (default: 5m)",
    )


def _short_time(text: str) -> float:
    return parse_amount(text, r"(\d+(?:\.\d+)?)([smh])", _SECONDS, "a time such as 25s or 5m")


def parse_amount(text: str, pattern: str, units: dict[str, int], expected: str) -> float:
    """`text` as a number times its unit, the groups of `pattern`. Raises ArgumentTypeError, with what is expected."""
    match = re.fullmatch(pattern, text, re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
    return float(match[1]) * units[match[2].lower()]


def print_json(value: Any) -> None:
    print(json_text(value, indent=2))


def _rows_of_group(group_id: str, store: Store) -> list[list[bytes]]:
    rollouts = store.query_rollouts(group_id)
    if not rollouts:
        raise CommandError(f"no rollout of group {group_id!r} was queued in {store.uri}; name one with --rollout")
    found = store.query_rows_by_rollout([rollout.rollout_id for rollout in rollouts]).values()
    if not any(found):
        raise CommandError(f"{store.uri} holds no spans yet of the {len(rollouts)} rollouts of group {group_id!r}")
    return [rows for rows in found if rows]


def _nearby_stores() -> str:
    found = [*sorted(Path().glob("*.db")), *sorted(Path().glob("runs/*/*.db"))]
    if not found:
        return "name another with --store URI; `agl serve` and `agl train` create one"
    return "there are " + ", ".join(f"--store sqlite:///{path}" for path in found)
