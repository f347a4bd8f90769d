"""Writes the pages of the documentation that come from the code, and gathers all pages of the site in build/docs.

    python -m docs.generate && zensical build --strict

Configuration, commands and span attributes are read from the code, and a test compares the committed pages with it. The
site also has the pages outside this folder, such as README.md.
"""

import argparse
import ast
import inspect
import os
import re
import shutil
import types
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from agl import semconv
from agl.cli import _commands as commands
from agl.config import AgentRoles, Config
from agl.config.section import Section

ROOT = Path(__file__).parents[1]
SITE = ROOT / "build" / "docs"
_NOTE = "This page is written by `python -m docs.generate` from the code.\n"
_LINK = re.compile(r"(?<!!)\[([^]]*)\]\(([^)#:]+)(#[^)]*)?\)")


def reference_pages() -> dict[str, str]:
    """The text of each page that comes from the code, by the name of its file."""
    return {
        "configuration.md": f"# Configuration reference\n\n{_NOTE}{_configuration()}",
        "cli.md": f"# Command reference\n\n{_NOTE}{_commands()}",
        "semantic-conventions.md": f"# Semantic conventions\n\n{_NOTE}{_attributes()}",
    }


def _table(titles: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [titles, tuple("---" for _ in titles), *rows]
    return "".join(
        "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in row) + " |\n" for row in lines
    )


def _documented(body: list[ast.stmt]) -> dict[str, str]:
    """The string after each annotated assignment of a module or a class, by the assigned name."""
    return {
        one.target.id: inspect.cleandoc(after.value.value)
        for one, after in pairwise(body)
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)
    }


# --- Configuration --------------------------------------------------------------------------------------------------


def _configuration() -> str:
    head = """
One YAML file configures a training and `agl serve`; [Train](05-train.md#configuration) explains it. An unknown key is
an error. A section that is not in the file has its defaults, except `train`, `sft`, `judge`, `engine.launch` and `tls`:
without them there is none of what they configure.
"""
    return head + "".join(_section(title, section) for title, section in _sections("", Config))


def _section(title: str, section: type[Section]) -> str:
    rows = list(_keys(title, section))
    table = _table(("key", "type", "default", "meaning"), iter(rows))
    return f"\n## {f'`{title}`' if title else 'The file'}\n\n{inspect.getdoc(section)}\n\n{table}" if rows else ""


def _sections(prefix: str, section: type[Section]) -> Iterator[tuple[str, type[Section]]]:
    """`section` and the sections below it, each with its path."""
    yield prefix, section
    for name, field in section.model_fields.items():
        path = name if not prefix else f"{prefix}.{name}"
        if section is AgentRoles:
            path = prefix
        for holder, below in _below(field.annotation):
            yield from _sections(path + holder, below)


def _below(annotation: Any) -> Iterator[tuple[str, type[Section]]]:
    """The sections in a type, each with what stands between the key and their own keys."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield "", annotation
    holder = {list: "[]", dict: ".<name>"}.get(get_origin(annotation) or annotation, "")
    for part in get_args(annotation):
        yield from ((holder + deeper, section) for deeper, section in _below(part))


def _keys(prefix: str, section: type[Section]) -> Iterator[tuple[str, ...]]:
    documents = documents_of(section)
    for name, field in section.model_fields.items():
        if not any(_below(field.annotation)):
            path = f"{prefix}.{name}" if prefix else name
            yield f"`{path}`", _type(field.annotation, field), _default(field), documents.get(name, "")


def documents_of(section: type[Section]) -> dict[str, str]:
    """What the code says of each key of `section`."""
    found: dict[str, str] = {}
    for holder in reversed(section.__mro__):
        if issubclass(holder, Section):
            (body,) = (
                node.body for node in ast.parse(inspect.getsource(holder)).body if isinstance(node, ast.ClassDef)
            )
            found |= _documented(body)
    return found


_SHOWN = {bool: "true or false", int: "integer", float: "number", str: "text", type(None): "null"}
_BOUNDS = {Gt: ("gt", "above"), Ge: ("ge", "at least"), Lt: ("lt", "below"), Le: ("le", "at most")}


def _type(annotation: Any, field: FieldInfo | None = None) -> str:
    if get_origin(annotation) is Annotated:
        return _type(get_args(annotation)[0])
    metadata = field.metadata if field else ()
    bounds = [
        f"{word} {getattr(one, name):g}"
        for one in metadata
        for kind, (name, word) in _BOUNDS.items()
        if type(one) is kind
    ]
    return ", ".join([_name(annotation), *bounds])


def _name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is types.UnionType or str(origin) == "typing.Union":
        return " or ".join(_type(part) for part in arguments if part is not type(None))
    if origin in (list, tuple):
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return f"mapping of {_type(arguments[1])}" if arguments[1] is not Any else "mapping"
    return _SHOWN.get(annotation, "text")


_END = "\n..."
"""YAML writes it after a value that is no collection."""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    text = yaml.safe_dump(_plain(field.get_default(call_default_factory=True)), default_flow_style=True, width=1000)
    return f"`{text.strip().removesuffix(_END)}`"


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | list | dict | tuple | None) else str(value)


# --- Commands -------------------------------------------------------------------------------------------------------


def _commands() -> str:
    subparsers = argparse.ArgumentParser().add_subparsers()
    for command in commands().values():
        command.load()(subparsers)
    return "".join(_command(name, parser) for name, parser in _leaves("agl", subparsers.choices))


def _leaves(path: str, parsers: Mapping[str, argparse.ArgumentParser]) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The parsers of the commands and verbs that run, each with its full name."""
    for name, parser in parsers.items():
        below = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        yield from _leaves(f"{path} {name}", below[0]) if below else [(f"{path} {name}", parser)]


def _command(name: str, parser: argparse.ArgumentParser) -> str:
    actions = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    example = inspect.cleandoc((parser.epilog or "").removeprefix("example:\n"))
    rows = ((_option(action), (action.help or "") % (vars(action) | {"prog": name})) for action in actions)
    options = f"\n{_table(('argument', 'meaning'), rows)}" if actions else ""
    return f"\n## `{name}`\n\n{' '.join((parser.description or '').split())}\n\n```text\n{example}\n```\n{options}"


def _option(action: argparse.Action) -> str:
    value = action.metavar or (action.dest.upper() if action.choices is None else "{" + ",".join(action.choices) + "}")
    if not action.option_strings:
        return f"`{value}`"
    takes = "" if action.nargs == 0 else f" {value}"
    return ", ".join(f"`{option}{takes}`" for option in action.option_strings)


# --- Span attributes ------------------------------------------------------------------------------------------------


def _attributes() -> str:
    source = inspect.getsource(semconv)
    head = "\nAll attributes are those of a span, never of the resource ([how to set them](02-trace-your-agent.md)).\n"
    parts = re.split(r"^# --- (.*?) -*\n", source, flags=re.MULTILINE)
    pairs = zip(parts[1::2], parts[2::2], strict=True)
    return head + "".join(f"\n## {title}\n\n{_constants(body)}" for title, body in pairs)


def _constants(source: str) -> str:
    """A table of the names that `source` assigns, with their documentation."""
    body = ast.parse(source).body
    documents = _documented(body)
    names = [node.target.id for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    texts = [(name, value) for name in names if isinstance(value := getattr(semconv, name), str)]
    rows = ((f"`{value}`", f"`{name}`", documents.get(name, "")) for name, value in texts)
    return _table(("name", "constant in `agl.semconv`", "meaning"), rows)


# --- The site -------------------------------------------------------------------------------------------------------


def site_pages() -> dict[Path, str]:
    """Every page of the site: its file in the repository, and its place in the site."""
    outside = {
        "README.md": "index.md",
        "CONTRIBUTING.md": "contributing.md",
        "CHANGELOG.md": "changelog.md",
        "SECURITY.md": "security-policy.md",
        "benchmarks/RESULTS.md": "results.md",
        "examples/sql_agent/README.md": "example-sql-agent.md",
        "examples/autogen_team/README.md": "example-autogen-team.md",
    }
    own = {path: path.name for path in sorted((ROOT / "docs").glob("*.md"))}
    return {ROOT / name: place for name, place in outside.items()} | own


def assemble() -> None:
    """Write all pages to build/docs, with links between them; links to other files of the repository become text."""
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.copytree(ROOT / "docs" / "images", SITE / "images")
    shutil.copy(ROOT / "docs" / "site.css", SITE)
    pages = site_pages()
    for path, place in pages.items():
        text = path.read_text(encoding="utf-8").replace("docs/images/", "images/")
        (SITE / place).write_text(_LINK.sub(lambda link, page=path: _linked(link, page, pages), text), encoding="utf-8")


def _linked(link: re.Match[str], page: Path, pages: Mapping[Path, str]) -> str:
    target = pages.get(Path(os.path.normpath(page.parent / link[2])))
    return f"[{link[1]}]({target}{link[3] or ''})" if target else link[1]


if __name__ == "__main__":
    for name, text in reference_pages().items():
        (ROOT / "docs" / name).write_text(text, encoding="utf-8")
    assemble()
