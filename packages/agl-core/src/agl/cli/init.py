"""`agl init`: a small example to start from, which trains in seconds."""

import argparse
import keyword
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from agl.cli.command import add_command
from agl.errors import CommandError

_EXAMPLE = files("agl.cli") / "example"
_SHARED = ("tasks.py", "reward.py", "config.yaml")


@dataclass(frozen=True, slots=True)
class _Framework:
    """What the agent of an example needs: its instrumentor, if any, and the package that provides each module."""

    instrument: str
    modules: dict[str, str]


_FRAMEWORKS = {
    "langgraph": _Framework(
        "agl_langchain",
        dict.fromkeys(("agl_langchain", "langgraph", "langchain_openai"), "'agl-langchain[instruments]'"),
    ),
    "autogen": _Framework(
        "agl_autogen",
        dict.fromkeys(("agl_autogen", "autogen_agentchat", "autogen_ext", "openai"), "'agl-autogen[instruments]'"),
    ),
    "plain": _Framework("", {"openai": "openai"}),
}
_TRAINER = {"agl_trainer": "agl-trainer"}


def register(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        "init",
        run,
        "Write a small example into a new folder: agent, tasks, reward and configuration. It trains a tiny random "
        "model in seconds. Prints the next three commands.",
        "agl init --framework langgraph colours",
    )
    parser.add_argument(
        "folder", metavar="FOLDER", nargs="?", type=Path, default=Path("colours"), help="new folder (default: colours)"
    )
    parser.add_argument(
        "--framework", choices=sorted(_FRAMEWORKS), default="langgraph", help="of the agent (default: langgraph)"
    )


def run(arguments: argparse.Namespace) -> int:
    folder, framework = Path(os.path.abspath(arguments.folder)), _FRAMEWORKS[arguments.framework]
    _check(folder)
    texts = {"agent.py": _text(f"{arguments.framework}.py"), **{name: _text(name) for name in _SHARED}}
    for name, text in texts.items():
        _write(folder / name, text.replace("NAME", folder.name).replace("INSTRUMENT", framework.instrument))
    print(f"wrote {', '.join(texts)} into {arguments.folder}; next:\n")
    print("\n".join(f"  {command}" for command in _next(folder, framework)))
    return 0


def _check(folder: Path) -> None:
    """Raises CommandError if the files cannot be the modules of a package `folder`, or would replace others."""
    name = folder.name
    if not name.isidentifier() or keyword.iskeyword(name):
        raise CommandError(f"{name!r} cannot be the name of a Python package, expected letters, digits and _")
    found = find_spec(name)
    if found is not None and found.origin is not None:
        raise CommandError(f"{name!r} is the name of an installed module ({found.origin}); choose another name")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CommandError(f"{folder} exists, and is no empty folder; choose another name")


def _text(name: str) -> str:
    return (_EXAMPLE / f"{name}.txt").read_text(encoding="utf-8")


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}; choose another folder") from error


def _next(folder: Path, framework: _Framework) -> Iterator[str]:
    """The commands that train the example, after one that installs what is missing."""
    needed = framework.modules | _TRAINER
    missing = dict.fromkeys(package for module, package in needed.items() if find_spec(module) is None)
    if missing:
        yield f"pip install {' '.join(missing)}"
    name, parent = folder.name, folder.parent
    start = "" if parent == Path.cwd() else f"cd {shlex.quote(str(parent))} && "
    yield f"{start}agl sft {name}/config.yaml      # learns from the examples"
    yield f"{start}agl train {name}/config.yaml    # learns from rewards"
    yield f"{start}agl inspect --last --store sqlite:///runs/{name}/agl.db"
