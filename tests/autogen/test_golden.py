"""The exact spans of a Swarm of three agents, on which users and trainers rely."""

from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests import golden
from tests.autogen.swarm_team import GOLDEN, recorded


async def test_the_span_tree_of_a_swarm_with_hand_offs_and_tools_equals_the_golden_file(
    memory: InMemorySpanExporter,
) -> None:
    """After an intended change, run `python -m tests.autogen.swarm_team` and read the difference."""
    assert await recorded(memory) == golden.read(GOLDEN)
