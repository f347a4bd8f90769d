"""Check the spans of every instrumentation, ours and the peers', in each situation. Writes docs/08-correctness.md.

.venv/bin/python -m benchmarks.correctness
.venv/bin/python -m benchmarks.correctness --ours --json     # check only ours, print JSON, write nothing

Each instrumentation runs in a separate process. All face the same checks: the expected spans of each situation in
`benchmarks/situations/`.
"""

import argparse
import gc
import importlib
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from benchmarks.instrumentations import COMPARED, ROOT, Instrumentation
from benchmarks.situations.desk import Situations, open_desk
from benchmarks.situations.recording import Recording

PAGE = ROOT / "docs" / "08-correctness.md"
LIMIT_S = 600
"""Time limit for all situations of one instrumentation."""
TITLES = {"langchain": "LangChain and LangGraph", "autogen": "AutoGen"}
FRAMEWORKS = {
    "langchain": ("langchain", "langchain-core", "langchain-openai", "langgraph"),
    "autogen": ("autogen-agentchat", "autogen-ext", "openai"),
}

Verdicts = dict[str, str | None]
"""Result by title of the situation: None if the spans are right, else the reason why they are wrong."""


@dataclass(frozen=True, slots=True)
class Column:
    """Results of one instrumentation, with the versions of its packages."""

    name: str
    versions: list[str]
    verdicts: Verdicts


def situations(framework: str) -> Situations:
    return importlib.import_module(f"benchmarks.situations.{framework}").SITUATIONS


def examine(framework: str, instrumentation: Instrumentation) -> Column:
    """Check every situation in a process with the instrumentation.

    Raises CalledProcessError if its packages cannot be installed.
    """
    process = instrumentation.child("benchmarks.correctness", "--child", framework, instrumentation.name)
    try:
        answer, _ = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
    if process.returncode:
        raise SystemExit(f"the process of {instrumentation.name} ended with {process.returncode}")
    return Column(**json.loads(answer.splitlines()[-1]))


def _child(framework: str, name: str) -> None:
    instrumentation = next(one for one in COMPARED[framework] if one.name == name)
    recording, provider = Recording(), TracerProvider()
    provider.add_span_processor(recording)
    trace.set_tracer_provider(provider)
    switched = instrumentation.switch_on(provider, InMemorySpanExporter())
    rows = situations(framework)
    gc.freeze()  # Excludes the imported modules from the garbage collection after every attempt, which saves time.
    with open_desk(switched, recording) as desk:
        verdicts = {one.title: one.verdict(desk) for one in rows}
    print("\n" + json.dumps({"name": name, "versions": instrumentation.versions(), "verdicts": verdicts}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", action="store_true", help="check only our instrumentations")
    parser.add_argument("--json", action="store_true", help="print the results as JSON and write no page")
    parser.add_argument("--child", nargs=2, metavar=("FRAMEWORK", "NAME"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _child(*arguments.child)
        return
    found = {
        framework: [column for one in COMPARED[framework] if (column := _column(framework, one, arguments.ours))]
        for framework in COMPARED
    }
    if arguments.json:
        verdicts = {framework: {one.name: one.verdicts for one in columns} for framework, columns in found.items()}
        print(json.dumps(verdicts, indent=1))
    else:
        PAGE.write_text(page(found), encoding="utf-8")


def _column(framework: str, instrumentation: Instrumentation, only_ours: bool) -> Column | None:
    if only_ours and not instrumentation.is_ours:
        return None
    print(f"{framework}: {instrumentation.name}", file=sys.stderr, flush=True)
    try:
        return examine(framework, instrumentation)
    except subprocess.CalledProcessError:
        print(f"{instrumentation.name} is left out: pip could not install it", file=sys.stderr)
        return None


def page(found: dict[str, list[Column]]) -> str:
    """The page: a table for each framework, followed by the reasons for each `no`."""
    parts = [_HEAD, _totals(found)]
    for framework, columns in found.items():
        parts += [f"## {TITLES[framework]}\n", _versions(framework, columns), _table(columns)]
        parts += [_reasons(column) for column in columns if any(column.verdicts.values())]
    return "\n".join([*parts, _FOOT])


_HEAD = """\
# 8. Correctness

This page compares instrumentations of LangChain, LangGraph and AutoGen: in which situations are the recorded spans
right? Look for the situations that your agent meets. Below each table are the reasons for each "no". We chose the
situations, and they include what training needs, such as token ids.
"""

_FOOT = """\
## How it is checked

- Each instrumentation runs in a process of its own, against a real server on loopback. All face the same checks.
- Ours are `LangChainInstrumentor().instrument()` and `AutoGenInstrumentor().instrument()`. In the rows without a
  gateway we also call `capture_token_ids(model)`.
- The others are enabled as their documentation describes, with their default settings. A feature that one does not
  intend to have, such as token ids, counts as "no".
- Each situation is tried in all ways in which it can occur: `invoke`, `ainvoke`, `stream`, `astream`, `batch`,
  `abatch`, `astream_events`. If only some of them fail, the reason names these.
- A model call, a tool call or a retriever is recognised by the attribute with which the instrumentation marks it.

The situations are code: `benchmarks/situations/langchain.py` and `benchmarks/situations/autogen.py`. A test requires
"yes" in every row of our own columns. This command runs all of them, and writes this page:

```sh
.venv/bin/python -m benchmarks.correctness
```
"""


def _totals(found: dict[str, list[Column]]) -> str:
    rows = [
        f"| {TITLES[framework]} | {column.name} | {verdicts.count(None)} of {len(verdicts)} |"
        for framework, columns in found.items()
        for column in columns
        if (verdicts := [*column.verdicts.values()])
    ]
    return "\n".join(["| framework | instrumentation | situations that are right |", "|---|---|---|", *rows, ""])


def _versions(framework: str, columns: Sequence[Column]) -> str:
    named = [f"{package} {version(package)}" for package in (*FRAMEWORKS[framework], "opentelemetry-sdk")]
    of_peers = [text for column in columns for text in column.versions]
    return f"Python {platform.python_version()}, {', '.join([*named, *of_peers])}.\n"


def _table(columns: Sequence[Column]) -> str:
    rows = [
        f"| situation | {' | '.join(column.name for column in columns)} |",
        f"|---|{':---:|' * len(columns)}",
        *(
            f"| {title} | {' | '.join(_cell(column.verdicts[title]) for column in columns)} |"
            for title in columns[0].verdicts
        ),
    ]
    return "\n".join([*rows, ""])


def _cell(wrong: str | None) -> str:
    return "yes" if wrong is None else "**no**"


def _reasons(column: Column) -> str:
    lines = [f"- {title}: {_plain(wrong)}" for title, wrong in column.verdicts.items() if wrong is not None]
    return "\n".join([f"### {column.name}\n", *lines, ""])


def _plain(text: str) -> str:
    """`text` with the special characters of Markdown escaped."""
    return text.translate({ord(sign): f"\\{sign}" for sign in "*<>[]|"})


if __name__ == "__main__":
    main()
