"""`agl store`: what a store holds."""

import argparse
from typing import Any

from agl.cli.command import add_command, add_store_option, existing_store


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser("store", description="Look after a store.")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    count = add_command(
        verbs,
        "count",
        run_count,
        "Print the number of spans, nothing else.",
        "agl store count --store sqlite:///agl.db",
    )
    add_store_option(count)


def run_count(arguments: argparse.Namespace) -> int:
    with existing_store(arguments.store) as store:
        print(store.count_spans())
    return 0
