"""``agentrl tools``: see what a model can call, check it, try it."""

import asyncio
import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from agentrl.errors import ConfigError

tools_app = typer.Typer(help="See, check and try the tools that a model can call.", no_args_is_help=True)

ToolFile = Annotated[
    str | None,
    typer.Option("--config", "-c", help="A run's YAML or a tool YAML; default: every shipped and installed tool."),
]
ModelName = Annotated[str | None, typer.Option("--model", "-m", help="Model whose tokenizer counts; default: the run's.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@tools_app.command("list")
def tools_list(config: ToolFile = None, as_json: AsJson = False) -> None:
    """Name, kind, place and limits of each tool, and where names are looked for."""
    from agentrl.assembly.tools import ToolSource, describe, search_order

    toolbox = ToolSource(config).toolbox()
    try:
        rows = [describe(tool) for tool in toolbox.tools]
    finally:
        asyncio.run(toolbox.aclose())
    if as_json:
        print(json.dumps({"tools": rows, "search_order": search_order()}, indent=1))
        return
    table = Table("name", "kind", "limits")
    table.add_column("where", overflow="fold")
    for row in rows:
        limits = row["limits"]
        shown = f"{limits['timeout_s']:g} s, {limits['concurrency']} at once, {limits['output_tokens']} tokens"
        shown += f", {limits['calls_per_s']:g}/s" if limits["calls_per_s"] else ""
        shown += f", {limits['retries']} retries" if limits["retries"] else ""
        shown += f", cache per {limits['cache']['scope']}" if limits["cache"] else ""
        table.add_row(row["name"], row["kind"] + (" ORACLE" if row["oracle"] else ""), shown, row["place"])
    Console().print(table)
    print("A name such as tools.x:y is looked for in:")
    for number, place in enumerate(search_order(), 1):
        print(f"  {number}. {place}")


@tools_app.command("check")
def tools_check(config: ToolFile = None, as_json: AsJson = False) -> None:
    """Load, connect and validate every tool. Exit code 1 when one cannot be used."""
    from agentrl.assembly.tools import ToolSource, check_tools

    findings = asyncio.run(check_tools(ToolSource(config).entries()))
    if as_json:
        print(json.dumps([f.to_json() for f in findings], indent=1))
    else:
        for finding in findings:
            print(finding.line())
    raise typer.Exit(1 if any(f.level == "fail" for f in findings) else 0)


@tools_app.command("schema")
def tools_schema(
    names: Annotated[list[str] | None, typer.Argument(help="Tools; default: all.", show_default=False)] = None,
    config: ToolFile = None,
    rendered: Annotated[bool, typer.Option("--rendered", help="Show the prompt that the model reads instead.")] = False,
    model: ModelName = None,
) -> None:
    """The JSON schemas as the model sees them; with --rendered -m MODEL the text of the prompt."""
    from agentrl.assembly.tools import ToolSource
    from agentrl.assembly.tools import rendered as render

    source = ToolSource(config, model=model)
    toolbox = source.toolbox()
    try:
        schemas = toolbox.schemas(names or None)
    finally:
        asyncio.run(toolbox.aclose())
    if not rendered:
        print(json.dumps(schemas, indent=2, ensure_ascii=False))
        return
    tokenizer = source.tokenizer()
    if tokenizer is None:
        raise ConfigError("--rendered needs a model's chat template: give -m MODEL, or a run's YAML with model.path")
    text, count = render(tokenizer, schemas)
    print(text)
    print(f"{count} tokens describe the tools", file=sys.stderr)


@tools_app.command("call")
def tools_call(
    name: Annotated[str, typer.Argument(help="The tool.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="'{\"a\": 1}' or a=1 b=text …", show_default=False)] = None,
    config: ToolFile = None,
    kwargs: Annotated[str, typer.Option(help="The row's tools_kwargs for this tool, as JSON.")] = "{}",
    model: ModelName = None,
    as_json: AsJson = False,
) -> None:
    """Make one call under the real deadlines and print what the model would read. Exit code 1 when it is an error."""
    from agentrl.assembly.tools import ToolSource, arguments_of, call_tool

    given, row = arguments_of(arguments or []), arguments_of([kwargs])
    source = ToolSource(config, model=model)
    tokenizer, missing = None, "no model given"
    try:
        tokenizer = source.tokenizer()
    except ConfigError:
        if model is not None:
            raise
        missing = "the run's model is not here"  # a call can be tried without it
    toolbox = source.toolbox(tokenizer=tokenizer)
    limit = source.config.serve.tool_tokens if source.config else None

    async def ask() -> None:
        try:
            observation = await call_tool(toolbox, name, given, kwargs=row, max_output_tokens=limit)
        finally:
            await toolbox.aclose()
        if as_json:
            print(json.dumps(asdict(observation), indent=1, ensure_ascii=False, default=str))
        else:
            print(observation.text)
            tokens = f"{len(tokenizer.encode(observation.text))} tokens" if tokenizer else f"not cut to the limit: {missing}"
            kind = f", error: {observation.error_kind}" if observation.error_kind else ""
            print(f"{observation.ms:.0f} ms, {tokens}{kind}", file=sys.stderr)
        if not observation.ok:
            raise typer.Exit(1)

    asyncio.run(ask())
