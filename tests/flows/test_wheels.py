"""The packages as a registry would have them: wheels and source distributions, installed away from this checkout."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from agl import semconv
from agl.server_thread import ServerThread
from agl.store import open_store

ROOT = Path(__file__).parents[2]
NAMES = ["agl_autogen", "agl_core", "agl_langchain", "agl_trainer"]
LIGHT = {"langchain-core", "orjson", "pydantic", "pyyaml", "regex", "urllib3", "xxhash"}
"""What an agent's process needs besides OpenTelemetry."""
AGENT = """
import agl
from agl_langchain import LangChainInstrumentor
from langchain_core.language_models import FakeListChatModel

agl.init(service_name="light")
LangChainInstrumentor().instrument()
with agl.rollout("light-1"):
    FakeListChatModel(responses=["42"]).invoke("?", config={"metadata": {"agl_role": "planner"}})
    agl.emit_reward(0.5)
agl.flush()
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `make dist` fills: of each package a source distribution, and a wheel built from that."""
    folder = tmp_path_factory.mktemp("dist")
    for package in sorted(ROOT.glob("packages/*")):
        build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(package)]
        subprocess.run(build, check=True, capture_output=True)
    return folder


def test_each_package_has_a_wheel_and_a_source_distribution_that_name_the_others_by_version(built: Path) -> None:
    wheels = {path.name.split("-")[0]: metadata_of(path) for path in sorted(built.glob("*.whl"))}
    assert [*wheels] == NAMES
    (version,) = {metadata["Version"] for metadata in wheels.values()}
    for name, metadata in wheels.items():
        ours = [need for need in needs_of(metadata) if need.name.startswith("agl-")]
        assert {(need.name, need.url, str(need.specifier)) for need in ours} == (
            set() if name == "agl_core" else {("agl-core", None, f"=={version}")}
        )
        assert metadata["License-File"] == "LICENSE"
        with zipfile.ZipFile(built / f"{name}-{version}-py3-none-any.whl") as files:
            assert sources_of(name.replace("_", "-")) <= {*files.namelist()}
        with tarfile.open(built / f"{name}-{version}.tar.gz") as source:
            licence = source.extractfile(f"{name}-{version}/LICENSE")
            assert licence and licence.read() == (ROOT / "LICENSE").read_bytes()


def test_agl_langchain_installs_alone_traces_an_agent_and_leaves_nothing(built: Path, tmp_path: Path) -> None:
    folder = tmp_path / "venv"
    venv.create(folder, symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    (wheel,) = built.glob("agl_langchain-*.whl")
    pip(folder, "install", "--find-links", str(built), str(wheel))

    ours = [metadata_of(next(built.glob(f"{name}-*.whl"))) for name in ("agl_core", "agl_langchain")]
    needed = {need.name for metadata in ours for need in needs_of(metadata) if need.marker is None}
    assert {name for name in needed if not name.startswith(("agl-", "opentelemetry-"))} == LIGHT

    trace(folder, tmp_path)
    printed = subprocess.run([folder / "bin/agl", "--version"], check=True, capture_output=True, text=True).stdout
    assert printed == f"agl {ours[0]['Version']}\n"
    pip(folder, "uninstall", "--yes", "agl-langchain", "agl-core")
    assert not [*site.glob("agl*"), *folder.glob("bin/agl*")]


def trace(folder: Path, tmp_path: Path) -> None:
    """Run the agent in the environment at `folder`; asserts that its call and its reward arrive."""
    store = open_store(f"sqlite:///{tmp_path / 'agl.db'}")
    with ServerThread(store, port=0, otlp_http_port=0) as server:
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": server.otlp_url, "PATH": os.environ["PATH"]}
        subprocess.run([folder / "bin/python", "-I", "-c", AGENT], check=True, env=environment, timeout=60)
    spans = store.query_spans("light-1")
    store.close()
    assert [span.attributes[semconv.ROLE] for span in spans if semconv.GEN_AI_OUTPUT_MESSAGES in span.attributes] == [
        "planner"
    ]
    assert [span.attributes[semconv.REWARD_VALUE] for span in spans if semconv.REWARD_VALUE in span.attributes] == [0.5]


def pip(folder: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "--quiet", *arguments]
    subprocess.run(command, check=True)


def sources_of(package: str) -> set[str]:
    """Every file of a package, code or not."""
    folder = ROOT / "packages" / package / "src"
    files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(folder).as_posix() for path in files}


def metadata_of(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        return HeaderParser().parsestr(files.read(name).decode())


def needs_of(metadata: Message) -> list[Requirement]:
    return [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
