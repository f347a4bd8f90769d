"""Parts that several commands share: parsers, options for the store and rollouts, and JSON output."""

import argparse
import json
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agl import otlp
from agl.config import DEFAULT_STORE_URI
from agl.errors import CommandError
from agl.span import Span
from agl.store import Store, open_store, sqlite_path

_HELP_WIDTH = 100


def add_command(
    subparsers: Any, name: str, run: Callable[[argparse.Namespace], int], description: str, example: str
) -> argparse.ArgumentParser:
    """Add a parser for the command or verb `name`, which calls `run` and shows `example` in its help."""
    parser = subparsers.add_parser(
        name,
        description=textwrap.fill(description, _HELP_WIDTH),
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_store_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--store", metavar="URI", default=DEFAULT_STORE_URI, help=f"URI of the store (default: {DEFAULT_STORE_URI})"
    )


def add_json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_rollout_options(parser: argparse.ArgumentParser) -> None:
    """`--rollout`, `--group` or `--last`, of which one is required."""
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--rollout", metavar="ID", action="append", help="a rollout; may be repeated")
    chosen.add_argument("--group", metavar="ID", help="all queued rollouts of this group")
    chosen.add_argument("--last", action="store_true", help="the rollout of the span that arrived last")


@contextmanager
def existing_store(uri: str) -> Iterator[Store]:
    """The store at `uri`. Raises CommandError if it does not exist, and does not create it."""
    sqlite_file(uri)
    store = open_store(uri)
    try:
        yield store
    finally:
        store.close()


def sqlite_file(uri: str) -> Path | None:
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


def print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2))


def _rows_of_group(group_id: str, store: Store) -> list[list[bytes]]:
    rollouts = store.query_rollouts(group_id)
    if not rollouts:
        raise CommandError(f"no rollout of group {group_id!r} was queued in {store.uri}; name one with --rollout")
    found = [store.query_rows(rollout.rollout_id) for rollout in rollouts]
    if not any(found):
        raise CommandError(f"{store.uri} holds no spans yet of the {len(rollouts)} rollouts of group {group_id!r}")
    return [rows for rows in found if rows]


def _nearby_stores() -> str:
    found = [*sorted(Path().glob("*.db")), *sorted(Path().glob("runs/*/*.db"))]
    if not found:
        return "name another with --store URI; `agl serve` and `agl train` create one"
    return "there are " + ", ".join(f"--store sqlite:///{path}" for path in found)
