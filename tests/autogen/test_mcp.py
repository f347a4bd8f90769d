"""Tools of a real MCP server, started as a child process."""

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from autogen_ext.tools.mcp import McpWorkbench, StdioServerParams

from tests.autogen.conftest import SwitchOn
from tests.autogen.scripted import agent, calls
from tests.autogen.span_tree import attributes, only, tree

SERVER = StdioServerParams(command=sys.executable, args=[str(Path(__file__).with_name("mcp_server.py"))])


@pytest.fixture
async def warehouse() -> AsyncIterator[McpWorkbench]:
    async with McpWorkbench(SERVER) as workbench:
        yield workbench


async def test_a_tool_of_an_mcp_server_has_one_span(spans, warehouse):
    executor = agent("executor", calls("stock", item="mug"), workbench=warehouse)
    spans.clear()
    result = await executor.run(task="How many mugs?")
    assert "7 x mug" in str(result.messages[-1].to_text())
    assert tree(spans.get_finished_spans()).splitlines() == [
        "invoke_agent executor [executor]",
        "  chat [executor]",
        "  execute_tool stock [executor]",
    ]


async def test_an_error_returned_by_an_mcp_server_marks_the_tools_span(spans, switch_on: SwitchOn, warehouse):
    """AutoGen itself does not mark it."""
    switch_on(redact=lambda text: text.replace("mug", "***"))
    executor = agent("executor", calls("broken", item="mug"), workbench=warehouse)
    spans.clear()
    await executor.run(task="How many mugs?")
    tool = only(spans.get_finished_spans(), "execute_tool broken")
    assert tool.status.status_code.name == "ERROR"
    assert attributes(tool)["error.type"] == "McpToolError"
    assert "no shelf for ***" in str(tool.status.description)
    assert len(tool.events) == 1
