"""The tests again with the oldest supported LangChain and LangGraph; otherwise they run with the newest."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

from agl_langchain import LangChainInstrumentor
from tests.oldest import ROOT, expect_to_pass

HERE = Path(__file__).parent
FILES = [
    "test_chat_span.py",
    "test_current_span.py",
    "test_golden.py",
    "test_requests.py",
    "test_role.py",
    "test_situations.py",
    "test_token_ids.py",
    "test_tree.py",
]
LATER = [
    "v3",  # event version v3 does not exist yet
    "test_the_role_of_a_prebuilt_agent_is_its_name",  # LangGraph before 1.2.4 drops the name of a nested agent
]


def declared() -> list[Requirement]:
    """The requirements of the package and of its extra `instruments`."""
    project = tomllib.loads((ROOT / "packages/agl-langchain/pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["instruments"]]
    return [Requirement(line) for line in lines if re.match("lang", line)]


def oldest(requirement: Requirement) -> str:
    """The lower bound of a requirement: `langgraph==1.1.5` for `langgraph>=1.1.5,<2`."""
    (bound,) = [bound.version for bound in requirement.specifier if bound.operator == ">="]
    return f"{requirement.name}=={bound}"


def test_the_instrumentor_asks_for_what_the_package_does() -> None:
    (asked,) = LangChainInstrumentor().instrumentation_dependencies()

    assert Requirement(asked) == next(item for item in declared() if item.name == "langchain-core")


def test_the_oldest_versions_that_we_declare_pass_our_tests() -> None:
    requirements = [oldest(requirement) for requirement in declared()]
    assert len(requirements) == 4
    expect_to_pass("langchain-oldest", requirements, [HERE / name for name in FILES], LATER)
