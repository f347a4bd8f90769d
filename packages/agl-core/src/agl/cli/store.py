"""`agl store`: counts, deletes, backs up, checks and migrates the contents of a store."""

import argparse
import re
from pathlib import Path
from typing import Any

from agl.cli.command import (
    add_command,
    add_json_option,
    add_store_option,
    add_verbs,
    existing_store,
    parse_amount,
    print_json,
    seconds,
    sqlite_file,
)
from agl.cli.terminal import counted
from agl.errors import CommandError, DamageError, OtlpError
from agl.secret_url import SecretUrl
from agl.store.project import database_name, split_project
from agl.store.repair import Repairable, damaged_spans, repair_server
from agl.store.sqlite.maintenance import backup, check, schema_version
from agl.store.sqlite.repair import repair

_BYTES = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


def register(subparsers: Any) -> None:
    verbs = add_verbs(subparsers, "store", "Maintain a store.")
    add_command(verbs, "count", run_count, "Print the number of spans and nothing else.", "agl store count")
    collect = add_command(
        verbs,
        "gc",
        run_gc,
        "Delete finished rollouts with all their spans: those that finished more than --older-than ago, then the "
        "oldest until the store is within --max-bytes. Queued and running rollouts stay.",
        "agl store gc --older-than 7d --max-bytes 2GB",
    )
    collect.add_argument("--older-than", metavar="TIME", type=seconds, help="e.g. 7d, 12h, 30m")
    collect.add_argument("--max-bytes", metavar="SIZE", type=_bytes, help="e.g. 2GB, 500MB, 1000000")
    add_json_option(collect)
    copy = add_command(
        verbs,
        "backup",
        run_backup,
        "Copy a SQLite store in its present state to FILE. Programs may write to the store meanwhile.",
        "agl store backup monday.db --store sqlite:///agl.db",
    )
    copy.add_argument("file", metavar="FILE", type=Path, help="a new file")
    add_command(
        verbs,
        "check",
        run_check,
        "Read all of a store, compare spans, rollouts, attempts and resources with their checksums, and report damage.",
        "agl store check",
    )
    add_command(
        verbs,
        "repair",
        run_repair,
        "Replace a damaged SQLite file by one with what is sound. The damaged rollouts are set aside in a file of "
        "their own, and the damaged file is kept. End what has the file open first. Of a store on a server, move what "
        "is damaged into files of this folder.",
        "agl store repair",
    )
    add_command(verbs, "migrate", run_migrate, "Update a store to this program's schema version.", "agl store migrate")
    for parser in verbs.choices.values():
        add_store_option(parser)


def run_count(arguments: argparse.Namespace) -> int:
    with existing_store(arguments.store) as store:
        print(store.count_spans())
    return 0


def run_gc(arguments: argparse.Namespace) -> int:
    if arguments.older_than is None and arguments.max_bytes is None:
        raise CommandError("say what may go: --older-than TIME, --max-bytes SIZE, or both")
    with existing_store(arguments.store) as store:
        collected = store.gc(older_than_s=arguments.older_than, max_bytes=arguments.max_bytes)
        left = store.count_spans()
    if arguments.json:
        print_json({"rollouts": collected.rollouts, "spans": collected.spans, "spans_left": left})
    else:
        rollouts, spans = counted(collected.rollouts, "rollout"), counted(collected.spans, "span")
        print(f"deleted {rollouts} with {spans}; {counted(left, 'span')} left")
    return 0


def run_backup(arguments: argparse.Namespace) -> int:
    backup(_file_of(arguments.store), arguments.file)
    print(f"{arguments.store} is copied to {arguments.file}")
    return 0


def run_check(arguments: argparse.Namespace) -> int:
    path = sqlite_file(arguments.store)
    findings = check(path) if path else _damage_of(arguments.store)
    for finding in findings:
        print(finding)
    print(f"{arguments.store} is {'damaged: restore a backup, or run `agl store repair`' if findings else 'sound'}")
    return 1 if findings else 0


def run_repair(arguments: argparse.Namespace) -> int:
    path = sqlite_file(arguments.store)
    if path is None:
        return _repair_server(arguments.store)
    repaired = repair(path)
    if repaired is None:
        print(f"{arguments.store} is sound")
        return 0
    for line in repaired.damage.lines():
        print(line)
    rollouts = counted(len(repaired.damage.rollouts), "damaged rollout")
    print(f"{arguments.store} now has what is sound; the file as it was is {repaired.damaged}")
    print(f"{rollouts} set aside: what is left of their spans is in sqlite:///{repaired.set_aside}")
    return 0


def _repair_server(uri: SecretUrl) -> int:
    with existing_store(uri) as store:
        if not isinstance(store, Repairable):
            raise CommandError(f"{uri} is no database: name the store itself, which that server has open")
        base, project = split_project(store.uri)
        name = database_name(re.sub(r"\W+", "-", str(base).partition("?")[0].rpartition("/")[2]), project)
        spans, rows = Path(f"{name}.set-aside.db").absolute(), Path(f"{name}.set-aside.jsonl").absolute()
        findings = repair_server(store, spans, rows)
    if not findings:
        print(f"{uri} is sound")
        return 0
    for finding in findings:
        print(finding)
    print(f"{uri} now has what is sound")
    places = {f"what is left of the spans of damaged rollouts is in sqlite:///{spans}": spans}
    for place, file in (places | {f"damaged rows are in {rows}": rows}).items():
        if file.exists():
            print(place)
    return 0


def _damage_of(uri: SecretUrl) -> list[str]:
    """The damage of a store on a server, whose rollouts are read one by one."""
    found: list[str] = []
    with existing_store(uri) as store:
        for rollout_id in store.rollout_ids():
            try:
                number = len(damaged_spans(store, rollout_id))
            except (DamageError, OtlpError) as error:
                found.append(f"rollout {rollout_id}: {error}")
            else:
                found += [f"rollout {rollout_id}: {number} of its spans damaged"] if number else []
        return found + store.damaged_rows()


def run_migrate(arguments: argparse.Namespace) -> int:
    path = sqlite_file(arguments.store)
    before = schema_version(path) if path else None
    with existing_store(arguments.store):  # Opening it migrates it.
        versions = f": {_format_versions(before, schema_version(path))}" if path else ""
        print(f"{arguments.store} is up to date{versions}")
    return 0


def _format_versions(before: int | None, after: int) -> str:
    return f"schema version {after}" + (f", was {before}" if before != after else "")


def _file_of(uri: SecretUrl) -> Path:
    """The file of a SQLite store. Raises CommandError for other stores, or if it does not exist."""
    path = sqlite_file(uri)
    if path is None:
        raise CommandError(f"{uri} is not a SQLite store; use the tools of its server, e.g. pg_dump for PostgreSQL")
    return path


def _bytes(text: str) -> int:
    return int(parse_amount(text, r"(\d+(?:\.\d+)?)([kmgt]b|)", _BYTES, "a size such as 2GB, 500MB or 1000000"))
