"""Roles by pattern: patterns that would take for ever are stopped."""

import logging
import time

import pytest

from agl.errors import ConfigError
from agl.role_map import RoleMap


def test_the_first_pattern_that_matches_the_whole_name_gives_the_role() -> None:
    roles = RoleMap({"writer": "write_query|rewrite.*", "reader": r"\w+_query"})
    names = ("write_query", "rewrite_it", "read_query", "read_query_now")
    assert [roles.match(name) for name in names] == ["writer", "writer", "reader", None]
    with pytest.raises(ConfigError, match=r"roles\['writer'\] is '\(', expected a regular expression"):
        RoleMap({"writer": "("})


@pytest.mark.parametrize(
    "pattern", [r"(a+)+$", r"(a|a)*b", r"(a|aa)+$", r"(.*a){25}", r"(\w+\s?)*!", r"((a{0,9}){0,9}){0,9}b"]
)
def test_a_pattern_that_takes_for_ever_gives_no_role_and_those_after_it_do(
    pattern: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = time.process_time()
    assert RoleMap({"slow": pattern, "other": ".*"}).match("a" * 200 + "?") == "other"
    assert time.process_time() - before < 5
    with caplog.at_level(logging.WARNING):
        assert RoleMap({"slow": "(a|aa)+$"}).match("a" * 200 + "?") is None
    assert "roles['slow'] is '(a|aa)+$', which needs more than 0.2 s" in caplog.text
