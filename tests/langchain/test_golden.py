"""The exact spans of an agent of three roles: what stands on them is what users and trainers rely on."""

from tests import golden
from tests.langchain.three_roles import GOLDEN, recorded


def test_the_span_tree_of_three_roles_in_subgraphs_is_the_golden_one() -> None:
    """Where a change is meant: `python -m tests.langchain.three_roles`, and read the difference."""
    assert recorded() == golden.read(GOLDEN)
