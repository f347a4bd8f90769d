"""An MCP server over stdin and stdout, which tests start with `python mcp_server.py`."""

from mcp.server.fastmcp import FastMCP

server = FastMCP("warehouse", log_level="ERROR")


@server.tool()
def stock(item: str) -> str:
    """Number of items in stock."""
    return f"7 x {item}"


@server.tool()
def broken(item: str) -> str:
    """Fails."""
    raise ValueError(f"no shelf for {item}")


if __name__ == "__main__":
    server.run()
