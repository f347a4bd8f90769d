"""The tests again with the oldest supported AutoGen and OpenAI client; otherwise they run with the newest."""

import re
import tomllib
from pathlib import Path

from tests.oldest import ROOT, expect_to_pass

HERE = Path(__file__).parent
FILES = [
    "test_abandoned_stream.py",
    "test_chat_span.py",
    "test_core_agent.py",
    "test_instrumentor.py",
    "test_redaction.py",
    "test_team.py",
    "test_team_kinds.py",
    "test_token_ids.py",
    "test_tool.py",
    "test_turn.py",
]
LATER = ["test_token_ids_of_the_server_are_packed", "test_the_users_extra_body_stays"]
"""AutoGen 0.7.0 does not pass the user's `extra_body` on."""


def oldest() -> list[str]:
    """The lower bound of each requirement of the extra `instruments`, e.g. `openai==1.93.0`."""
    project = tomllib.loads((ROOT / "packages/agl-autogen/pyproject.toml").read_text())
    declared = project["project"]["optional-dependencies"]["instruments"]
    bounds = [re.match(r"([\w.\[\]-]+)>=([\d.]+)", requirement) for requirement in declared]
    return [f"{bound[1]}=={bound[2]}" for bound in bounds if bound]


def test_the_oldest_versions_that_we_declare_pass_our_tests():
    requirements = oldest()
    assert len(requirements) == 3
    expect_to_pass("autogen-oldest", requirements, [HERE / name for name in FILES], LATER)
