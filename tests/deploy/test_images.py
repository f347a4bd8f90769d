"""The recipes of the images: their steps run in fresh environments here, because no container engine is needed so."""

import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

from agl.cli import _parser
from tests.deploy.manifests import DEPLOY, SECRETS, compose

ROOT = DEPLOY.parent
IMAGES = sorted(DEPLOY.glob("docker/*.Dockerfile"))
_SERVERS = ("starlette", "uvicorn", "grpc", "psycopg", "redis", "cassandra", "torch")


@dataclass(frozen=True, slots=True)
class Recipe:
    """The instructions of the stages of a Dockerfile, in order: name and text."""

    stages: list[list[tuple[str, str]]]

    @classmethod
    def read(cls, path: Path) -> "Recipe":
        lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
        stages: list[list[tuple[str, str]]] = []
        for line in "\n".join(lines).replace("\\\n", " ").splitlines():
            name, _, text = line.partition(" ")
            if name == "FROM":
                stages.append([])
            stages[-1].append((name, text))
        return cls(stages)

    def texts(self, name: str, stage: int = -1) -> list[str]:
        return [text for each, text in self.stages[stage] if each == name]


def build(path: Path, folder: Path, **arguments: str) -> Path:
    """Run the steps of the first stage with `/opt/agl` at `folder`; returns the folder of its programs.

    Like all build arguments, `arguments` are variables of the steps.
    """
    recipe = Recipe.read(path)
    defaults = (shlex.split(text)[0].partition("=") for text in recipe.texts("ARG", 0))
    variables = {name: value for name, _, value in defaults} | arguments
    assert recipe.texts("COPY", 0) == ["packages /src/packages"]
    assert recipe.texts("COPY") == ["--from=build /opt/agl /opt/agl"]
    for step in recipe.texts("RUN", 0):
        command = step.replace("/src/packages", str(ROOT / "packages")).replace("/opt/agl", str(folder))
        command = re.sub(r"^python ", f"{shlex.quote(sys.executable)} ", command)
        environment = os.environ | {"PIP_QUIET": "1", "PIP_NO_COMPILE": "1"} | variables
        subprocess.run(["sh", "-ec", command], check=True, env=environment)
        if command.endswith(str(folder)) and arguments.get("TORCH"):
            see_ours(folder)
    return folder / "bin"


def see_ours(folder: Path) -> None:
    """Let the environment find what ours has, torch for example, so that pip checks it and downloads little."""
    ours = sysconfig.get_path("purelib")
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    site.joinpath("ours.pth").write_text(f"import site; site.addsitedir({ours!r})\n")


def has(programs: Path, *modules: str) -> list[str]:
    """Those of `modules` that the environment has."""
    code = f"import importlib.util as u, json; print(json.dumps([m for m in {modules} if u.find_spec(m)]))"
    return json.loads(subprocess.run([programs / "python", "-I", "-c", code], check=True, capture_output=True).stdout)


def help_of(programs: Path, *command: str) -> str:
    return subprocess.run([programs / "agl", *command, "--help"], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
def test_an_image_is_slim_runs_as_a_number_and_runs_agl(path: Path) -> None:
    recipe = Recipe.read(path)
    assert len(recipe.stages) == 2 and all("-slim" in recipe.texts("FROM", stage)[0] for stage in (0, 1))
    (user,) = recipe.texts("USER")
    assert int(user) > 0, "Kubernetes cannot tell whether a name is root"
    assert recipe.stages[-1][-2:][0] == ("ENTRYPOINT", '["agl"]')
    command = json.loads(recipe.texts("CMD")[0])
    with pytest.raises(SystemExit) as ended:
        _parser(command).parse_args(command)
    assert ended.value.code == 0
    assert "TOKEN" not in path.read_text() and "PASSWORD" not in path.read_text()


def test_every_image_of_compose_has_a_recipe() -> None:
    services = compose(SECRETS).values()
    built = {ROOT / each["build"]["dockerfile"]: each["build"].get("args", {}) for each in services if "build" in each}
    assert {*built} == {*IMAGES}
    for path, arguments in built.items():
        assert arguments.keys() <= {text.partition("=")[0] for text in Recipe.read(path).texts("ARG", 0)}


def test_the_server_image_has_all_stores_and_no_torch(tmp_path: Path) -> None:
    programs = build(DEPLOY / "docker/server.Dockerfile", tmp_path / "agl")
    assert "--queue" in help_of(programs, "serve")
    assert has(programs, *_SERVERS) == [name for name in _SERVERS if name != "torch"]


def test_the_agent_image_has_the_plugins_only(tmp_path: Path) -> None:
    programs = build(DEPLOY / "docker/agent.Dockerfile", tmp_path / "agl")
    assert "--store" in help_of(programs, "runner")
    assert has(programs, "agl", "agl_langchain", "agl_autogen", "agl_trainer", *_SERVERS) == [
        *("agl", "agl_langchain", "agl_autogen")
    ]


def test_the_trainer_image_trains(tmp_path: Path) -> None:
    programs = build(DEPLOY / "docker/trainer.Dockerfile", tmp_path / "agl", TORCH="torch", AGENT_PACKAGES="langgraph")
    assert "--from-store" in help_of(programs, "train")
    assert (programs.parent / "bin/agl").exists()
