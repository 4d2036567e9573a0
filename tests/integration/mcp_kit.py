"""A real MCP server, written with the official SDK. ``python mcp_kit.py stdio`` or ``python mcp_kit.py http PORT``."""

import asyncio
import os
import sys
from typing import Literal

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import ToolAnnotations
from pydantic import BaseModel

server = MCPServer("kit")
NOTES: dict[str, str] = {"pi": "3.14"}


class Point(BaseModel):
    """A place."""

    x: float
    y: float = 0.0


@server.tool(annotations=ToolAnnotations(read_only_hint=True))
def lookup(key: str) -> str:
    """Look a note up."""
    if key not in NOTES:
        raise ToolError(f"no note {key}")
    return NOTES[key]


@server.tool()
def place(point: Point, unit: Literal["km", "mile"] = "km", tags: list[str] | None = None) -> str:
    """Name a place."""
    return f"{point.x:g},{point.y:g} {unit} {tags}"


@server.tool()
def pid() -> str:
    """The server's process, and a variable of its environment."""
    return f"{os.getpid()} {os.environ.get('KIT_TOKEN', 'none')} {os.environ.get('KIT_OTHER', 'none')}"


@server.tool()
def die() -> str:
    """End the server in the middle of a call."""
    print("about to die of KIT_TOKEN=" + os.environ.get("KIT_TOKEN", ""), file=sys.stderr, flush=True)
    os._exit(3)


@server.tool()
async def sleep(seconds: float) -> str:
    """Sleep."""
    await asyncio.sleep(seconds)
    return "slept"


if __name__ == "__main__":
    if sys.argv[1] == "broken":
        print("cannot open the notes: KIT_TOKEN=" + os.environ.get("KIT_TOKEN", ""), file=sys.stderr)
        sys.exit(4)
    if sys.argv[1] == "silent":
        sys.stdin.read()
    elif sys.argv[1] == "stdio":
        server.run("stdio")
    else:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[2]))
