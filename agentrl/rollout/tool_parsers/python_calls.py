"""Calls written as Python: ``name(key=value, …)``. Read through Python's ``ast``; only literals are values, nothing runs."""

import ast
import re
import warnings
from typing import Any, NamedTuple

from agentrl.rollout.tool_parsers import FoundCall
from agentrl.rollout.tool_parsers.reading import CUT, call_from, failed

EXAMPLE = '[tool(key="value", other=1)]'
MAX_DEPTH = 20
"""Brackets within brackets. Python's own parser needs exponential time for some deeply nested errors."""
MAX_LENGTH = 200_000
"""Characters of one call."""
_TOKEN = re.compile(
    r"""'''(?:\\.|[^\\])*?'''|\"\"\"(?:\\.|[^\\])*?\"\"\"|(?P<triple>'''|\"\"\")"""
    r"""|'(?:\\.|[^'\\\n])*'|"(?:\\.|[^"\\\n])*"|(?P<quote>['"])|(?P<open>[\[({])|(?P<close>[\])}])""",
    re.DOTALL,
)
_NAME = re.compile(r"[A-Za-z_][\w.\-]*", re.ASCII)
_PAIRS = {"[": "]", "(": ")", "{": "}"}


class Extent(NamedTuple):
    """Where a bracketed expression ends."""

    end: int | None
    """One past its closing bracket; None where it has none."""
    problem: str
    """Why not, in words for the model."""


def extent(text: str, start: int) -> Extent:
    """The end of the bracket that opens at ``start``; brackets in strings do not count."""
    stack: list[str] = []
    position, limit = start, min(len(text), start + MAX_LENGTH)
    while True:
        token = _TOKEN.search(text, position, limit)
        if token is None:
            return Extent(None, f"the bracket {text[start]!r} is never closed")
        position = token.end()
        if token.lastgroup in ("quote", "triple"):
            return Extent(None, f"a string is not closed near {text[token.start() : token.start() + 30]!r}")
        if token.lastgroup == "open":
            if len(stack) == MAX_DEPTH:
                return Extent(None, f"it is nested more than {MAX_DEPTH} levels deep")
            stack.append(_PAIRS[token.group()])
        elif token.lastgroup == "close":
            if token.group() != stack[-1]:
                return Extent(None, f"found {token.group()!r} where {stack[-1]!r} belongs")
            stack.pop()
            if not stack:
                return Extent(position, "")


def read_call(text: str, start: int, *, name: str, is_cut: bool) -> tuple[FoundCall, int | None]:
    """The call of ``name`` whose ``(`` stands at ``start``; also returns its end, None where it has none."""
    end, problem = extent(text, start)
    if end is None:
        reason = CUT if is_cut else f"{problem}. Write {EXAMPLE}"
        return failed(reason, name + text[start:]), None
    raw = name + text[start:end]
    try:
        arguments = _arguments(text[start:end])
    except _NotLiteral as error:
        return failed(f"{error}. Write {EXAMPLE}", raw), end
    return call_from(name, arguments, raw=raw, example=EXAMPLE), end


def name_at(text: str, position: int) -> re.Match[str] | None:
    """A tool's name at ``position`` that is followed by ``(``."""
    match = _NAME.match(text, position)
    return match if match and text.startswith("(", match.end()) else None


class _NotLiteral(Exception):
    """The arguments are no literals; the message says which."""


def _arguments(source: str) -> dict[str, Any]:
    """Keyword arguments of ``(…)``."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in the model's text are its business
            tree = ast.parse("f" + source, mode="eval").body
    except SyntaxError as error:
        raise _NotLiteral(f"not Python ({error.msg})") from error
    except UnicodeEncodeError as error:
        raise _NotLiteral("the text holds half of a surrogate pair; write the character itself") from error
    except (ValueError, MemoryError, RecursionError) as error:
        raise _NotLiteral(f"not readable ({type(error).__name__})") from error
    if not isinstance(tree, ast.Call):
        raise _NotLiteral("this is no call")
    if tree.args:
        raise _NotLiteral("arguments need names, as in key=value")
    arguments: dict[str, Any] = {}
    for keyword in tree.keywords:
        if keyword.arg is None:
            raise _NotLiteral("** is not possible; write each argument as key=value")
        if keyword.arg in arguments:
            raise _NotLiteral(f"{keyword.arg} is given twice")
        arguments[keyword.arg] = _literal(keyword.value, keyword.arg)
    return arguments


def _literal(node: ast.expr, where: str) -> Any:
    try:
        return _as_json(ast.literal_eval(node), where)
    except (ValueError, TypeError, MemoryError, RecursionError) as error:
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        if names & {"true", "false", "null"}:
            raise _NotLiteral(f"{where}: write True, False and None, not true, false and null") from error
        raise _NotLiteral(f"{where}: only plain values are possible (strings, numbers, lists, dicts), no expressions") from error


def _as_json(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        if not all(isinstance(k, str) for k in value):
            raise _NotLiteral(f"{where}: the keys of a dict must be strings")
        return {k: _as_json(v, where) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(v, where) for v in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float) and value - value == 0:
        return value
    raise _NotLiteral(f"{where}: {type(value).__name__} is no string, number, list or dict")
