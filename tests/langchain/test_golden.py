"""The exact spans of an agent of three roles, on which users and trainers rely."""

from tests import golden
from tests.langchain.three_roles import GOLDEN, recorded


def test_the_span_tree_of_three_roles_in_subgraphs_equals_the_golden_file() -> None:
    """After an intended change, run `python -m tests.langchain.three_roles` and read the difference."""
    assert recorded() == golden.read(GOLDEN)
