"""`agl inspect`: one rollout as a tree of spans."""

import argparse
import shutil
from typing import Any

from agl.cli.command import (
    add_command,
    add_json_option,
    add_store_option,
    existing_store,
    last_rollout_id,
    print_json,
    spans_of,
)
from agl.cli.inspection import Inspection
from agl.errors import CommandError
from agl.sampling import Undecided
from agl.store import Store
from agl.store.traffic import TrafficStore


def register(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        "inspect",
        run,
        "Print a rollout as a tree of spans with roles, rewards, token counts and policy versions. Each model call "
        "shows whether it trained; if not, why, and what to do. --text adds prompts, answers, tool calls and results; "
        "--json has all of it.",
        "agl inspect --last --text --store sqlite:///agl.db",
    )
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("rollout", metavar="ROLLOUT", nargs="?", help="id of the rollout")
    chosen.add_argument("--last", action="store_true", help="the rollout of the span that arrived last")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument(
        "--text", action="store_true", help="show prompts, answers, observations, tool calls and results"
    )
    add_json_option(shown)
    add_store_option(parser)


def run(arguments: argparse.Namespace) -> int:
    with existing_store(arguments.store) as store:
        rollout_id = last_rollout_id(store) if arguments.last else arguments.rollout
        inspection = _inspection(rollout_id, store)
    if arguments.json:
        print_json(inspection.to_json())
    else:
        width = shutil.get_terminal_size().columns if arguments.text else None
        print(inspection.text(width), end="")
    return 0


def _inspection(rollout_id: str, store: Store) -> Inspection:
    """Of the stored spans, or of those that sampling has not decided yet. Raises CommandError if there are none."""
    try:
        return Inspection(spans_of(rollout_id, store))
    except CommandError as error:
        if not isinstance(store, TrafficStore):
            raise CommandError(
                f"{error}. If that server samples, it may not have decided the rollout yet: inspect it with the "
                "store_uri of the server"
            ) from error
        undecided = Undecided.of(store, rollout_id)
        if undecided is None:
            raise
        return Inspection(undecided.spans, pending=undecided.describe())
