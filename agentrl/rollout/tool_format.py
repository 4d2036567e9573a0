"""Which tool-call format a model speaks: the one its own chat template prints.

`choose_parser` renders a call through the template and asks every parser what it finds. A format that is set by hand is
held against the same render, since a parser that cannot read the template's own calls is the wrong one.
"""

from typing import Any

from agentrl.errors import ConfigError, TemplateError
from agentrl.rollout.chat_template import ChatTemplate
from agentrl.rollout.tool_parsers import ToolParser, get_tool_parser, tool_parsers
from agentrl.types import Message, ToolCall

AUTO = "auto"
_NAME, _ARGUMENTS = "get_weather", {"city": "Oslo", "unit": "celsius"}


def choose_parser(name: str, template: ChatTemplate) -> str:
    """The parser to use for ``name``: itself, or for ``auto`` the one that reads what the template prints.

    Args:
        name: ``auto`` or a registered parser.
        template: with the run's tools. Without tools nothing is parsed, so anything goes.

    Raises:
        ConfigError: there is no such parser; or ``auto`` found none, or several, and the message says what is near.
    """
    if name != AUTO:
        return get_tool_parser(name).name
    if template.tools is None:
        return "hermes"
    printed = printed_call(template)
    fits = [] if printed is None else [p.name for p in tool_parsers().values() if _reads(p, printed)]
    if len(fits) == 1:
        return fits[0]
    near = _near(_source(template))
    if not fits and len(near) == 1 and near[0][1] > 1:
        return near[0][0]  # it prints no calls, or in a way of its own, but teaches exactly one format by several marks
    shown = "prints no tool calls" if printed is None else f"prints a call as {printed[:200]!r}"
    if fits:
        what = f"which {' and '.join(fits)} can read"
    else:
        what = "which no parser reads" if printed is not None else "so the format cannot be seen"
    hint = f" Its text looks like: {', '.join(n for n, _ in near)}." if near else ""
    raise ConfigError(
        f"serve.parser=auto: the chat template {shown}, {what}.{hint} Set serve.parser to one of {', '.join(tool_parsers())}"
    )


def misread(name: str, template: ChatTemplate) -> str:
    """Why parser ``name`` does not fit the template, in words; empty where it does, or where nothing can be compared."""
    if template.tools is None:
        return ""
    printed = printed_call(template)
    if printed is None or _reads(get_tool_parser(name), printed):
        return ""
    fits = [p.name for p in tool_parsers().values() if _reads(p, printed)]
    better = f"; set serve.parser={fits[0]}" if fits else ""
    return f"serve.parser={name} does not read a call as the chat template prints it, {printed[:200]!r}{better}"


def printed_call(template: ChatTemplate) -> str | None:
    """An assistant turn with one call, as the template prints it; None where it prints no calls."""
    message: Message = {"role": "assistant", "content": "", "tool_calls": [template.call(_NAME, _ARGUMENTS)]}
    try:
        printed = template.rendered_turn(message)
    except TemplateError:
        return None
    return printed if _NAME in printed and _ARGUMENTS["city"] in printed else None


def _reads(parser: ToolParser, printed: str) -> bool:
    found = parser.find_calls(printed)
    return len(found) == 1 and isinstance(found[0], ToolCall) and (found[0].name, found[0].arguments) == (_NAME, _ARGUMENTS)


def _near(source: str) -> list[tuple[str, int]]:
    """Parsers with marks in the template's text, and how many; the likeliest first, only those with the most."""
    marks = {p.name: sum(m in source for m in p.markers) for p in tool_parsers().values()}
    best = max(marks.values())
    return [(name, n) for name, n in marks.items() if n == best] if best else []


def _source(template: ChatTemplate) -> str:
    source: Any = template.tokenizer.chat_template
    return source if isinstance(source, str) else str(source)
