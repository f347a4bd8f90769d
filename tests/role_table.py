"""The tables of docs/02 that state the role in each way to build an agent."""

from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs/02-trace-your-agent.md"
OF_THE_MODEL = "*the model's name*"


def table(heading: str) -> dict[str, str]:
    """The rows of the table with this first heading: each way, and the roles of its model calls in order."""
    _, found, rest = PAGE.read_text(encoding="utf-8").partition(f"| {heading} |")
    assert found, f"docs/02 has no table of {heading!r}"
    rows = [line.split("|")[1:3] for line in rest.partition("\n\n")[0].splitlines()[2:]]
    return {way.strip(): roles.strip() for way, roles in rows}


def roles_in_order(roles: list[object]) -> str:
    """As in the tables: each role once, in the order of the first calls."""
    return ", ".join(OF_THE_MODEL if role is None else f"`{role}`" for role in dict.fromkeys(roles))
