"""`agl spans`: spans as OTLP JSON lines, one export request per line, the format of the OpenTelemetry collector."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from agl import otlp
from agl.cli.command import (
    add_command,
    add_json_option,
    add_rollout_options,
    add_store_option,
    add_verbs,
    existing_store,
    print_json,
    rows_of_rollouts,
)
from agl.cli.terminal import counted
from agl.errors import CommandError, OtlpError
from agl.store import opened_store
from agl.store.span_row import SpanRow, parse_json
from agl.trajectory import read_sampled

_SPANS_PER_LINE = 100


def register(subparsers: Any) -> None:
    verbs = add_verbs(subparsers, "spans", "Export and import spans as OTLP JSON lines.")
    export = add_command(
        verbs, "export", run_export, "Print the spans of rollouts.", "agl spans export --last > spans.jsonl"
    )
    add_rollout_options(export)
    add_store_option(export)
    import_ = add_command(
        verbs,
        "import",
        run_import,
        "Add the spans of files to a store. A span that is in the store already is not added again.",
        "agl spans import spans.jsonl --store sqlite:///agl.db",
    )
    import_.add_argument("files", metavar="FILE", nargs="+", help="file of OTLP JSON lines; - for standard input")
    add_store_option(import_)
    add_json_option(import_)


def run_export(arguments: argparse.Namespace) -> int:
    with existing_store(arguments.store) as store:
        for rows in map(_with_sampling, rows_of_rollouts(arguments, store)):
            for start in range(0, len(rows), _SPANS_PER_LINE):
                print(otlp.to_json(rows[start : start + _SPANS_PER_LINE]))
    return 0


def run_import(arguments: argparse.Namespace) -> int:
    read = kept = 0
    with opened_store(arguments.store) as store:
        for file in arguments.files:
            for rows in _read(file):
                read += len(rows)
                kept += store.append_rows(rows)
    if arguments.json:
        print_json({"read": read, "new": kept})
    else:
        print(f"{counted(read, 'span')} read, {kept} of them new in {arguments.store}")
    return 0


def _with_sampling(rows: Sequence[bytes]) -> Sequence[bytes]:
    """The spans of a rollout with the decision of sampling in their trace state, from which other tools weigh them."""
    sampled = read_sampled(otlp.decode(b"".join(rows)))
    return rows if sampled is None else [otlp.with_trace_state(row, sampled.decision.trace_state) for row in rows]


def _read(file: str) -> Iterator[Sequence[SpanRow]]:
    """Spans of each line. Raises CommandError if the file cannot be read, OtlpError naming an invalid line."""
    try:
        with sys.stdin.buffer if file == "-" else open(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _rows(line, f"{file}:{number}")
    except OSError as error:
        raise CommandError(f"cannot read {file}: {error.strerror}") from error


def _rows(line: bytes, location: str) -> Sequence[SpanRow]:
    try:
        return parse_json(line).all_rows()
    except OtlpError as error:
        raise OtlpError(
            f"{location}: {error}; the lines before it are imported; correct this line and import the file again"
        ) from error
