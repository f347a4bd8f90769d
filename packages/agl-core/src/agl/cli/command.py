"""What the commands share: their parser, the options that name a store and rollouts, and JSON on stdout."""

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
from agl.store import Store, open_store

_WIDTH = 100


def add_command(
    subparsers: Any, name: str, run: Callable[[argparse.Namespace], int], description: str, example: str
) -> argparse.ArgumentParser:
    """A parser for `agl <name>` that runs `run` and shows `example` in its help."""
    parser = subparsers.add_parser(
        name,
        description=textwrap.fill(description, _WIDTH),
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_store_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--store", metavar="URI", default=DEFAULT_STORE_URI, help=f"the store (default: {DEFAULT_STORE_URI})"
    )


def add_json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_rollout_options(parser: argparse.ArgumentParser) -> None:
    """`--rollout`, `--group` or `--last`; exactly one is needed."""
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--rollout", metavar="ID", action="append", help="this rollout; may be given several times")
    chosen.add_argument("--group", metavar="ID", help="every queued rollout of this group")
    chosen.add_argument("--last", action="store_true", help="the rollout whose span arrived last")


@contextmanager
def existing_store(uri: str) -> Iterator[Store]:
    """The store at `uri`, which is not made if it is not there. Raises CommandError then."""
    sqlite_file(uri)
    store = open_store(uri)
    try:
        yield store
    finally:
        store.close()


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite store; None for other stores. Raises CommandError where it is not there."""
    if not uri.startswith("sqlite:///"):
        return None
    path = Path(uri.removeprefix("sqlite:///"))
    if not path.exists():
        raise CommandError(f"there is no store at {path.absolute()}; {_say_stores_nearby()}")
    return path


def rows_of_rollouts(arguments: argparse.Namespace, store: Store) -> list[list[bytes]]:
    """Spans, as OTLP, of each rollout that the rollout options name. Raises CommandError where there are none."""
    if arguments.group:
        return _rows_of_group(arguments.group, store)
    rollout_ids = [last_rollout_id(store)] if arguments.last else arguments.rollout
    return [_rows_of(rollout_id, store) for rollout_id in rollout_ids]


def spans_of_rollouts(arguments: argparse.Namespace, store: Store) -> list[list[Span]]:
    """Spans of each rollout that the rollout options name. Raises CommandError where there are none."""
    return [otlp.decode(b"".join(rows)) for rows in rows_of_rollouts(arguments, store)]


def spans_of(rollout_id: str, store: Store) -> list[Span]:
    """Spans of a rollout. Raises CommandError where there are none."""
    return otlp.decode(b"".join(_rows_of(rollout_id, store)))


def _rows_of(rollout_id: str, store: Store) -> list[bytes]:
    rows = store.query_rows(rollout_id)
    if not rows:
        last = store.last_rollout_id()
        hint = f"; the last one there is {last}" if last else ", nor any other span"
        raise CommandError(f"{store.uri} holds no span of rollout {rollout_id!r}{hint}")
    return rows


def last_rollout_id(store: Store) -> str:
    """Rollout of the span that arrived last. Raises CommandError where the store is empty."""
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


def _say_stores_nearby() -> str:
    found = [*sorted(Path().glob("*.db")), *sorted(Path().glob("runs/*/*.db"))]
    if not found:
        return "name another with --store URI (`agl serve` and `agl train` make one)"
    return "there are " + ", ".join(f"--store sqlite:///{path}" for path in found)
