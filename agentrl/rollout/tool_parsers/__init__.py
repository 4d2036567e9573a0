"""Find tool calls in sampled text, one file per format. The text was decoded for this only and is never encoded again."""

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Protocol, TypeAlias

from agentrl.errors import ConfigError
from agentrl.types import ToolCall


@dataclass(frozen=True, slots=True, kw_only=True)
class ParseFailure:
    """Text that opens a call and is none. ``reason`` is shown to the model, so it says what to write instead."""

    reason: str
    raw: str = ""


FoundCall: TypeAlias = ToolCall | ParseFailure


class ToolParser(Protocol):
    """One tool-call format."""

    name: str
    markers: tuple[str, ...]
    """Strings by which a template that teaches this format can be told; only a hint, where a template prints no calls."""
    openers: tuple[str, ...]
    """Strings with which the markup of a call can begin: what is shown while it is sampled stops there."""
    line_openers: tuple[str, ...]
    """The same for strings that only count as the first of a line: brackets, in formats that mark calls with nothing else."""
    # A parser may also name its `reasoning`, the tags that begin reasoning and those that end it (default: <think>), and its
    # `closers`, strings with which a call ends: a streamed answer shows calls without fault when one was sampled. What `find_calls` gives for a text up to there, before the first failure, must then be the beginning of
    # what it gives for any longer text. Without them, calls are shown when the turn is over.

    def find_calls(self, text: str, *, is_cut: bool = False) -> list[FoundCall]:
        """The calls in ``text``, in order, with a `ParseFailure` for each that is malformed.

        Never raises, and takes time linear in the text.

        Args:
            text: one assistant turn, decoded, without its end-of-turn token.
            is_cut: the turn ended at a token limit, so its last call may be incomplete.
        """
        ...


_SHIPPED = ("deepseek", "glm", "gpt_oss", "hermes", "llama3_json", "mistral", "pythonic", "qwen3_coder")
_ALIASES = {"qwen": "hermes", "gpt-oss": "gpt_oss", "harmony": "gpt_oss", "llama3": "llama3_json", "qwen3_xml": "qwen3_coder"}
"""Names that other servers give to the same formats."""
_PARSERS: dict[str, Callable[[], ToolParser]] = {}


def tool_parser(name: str) -> Callable[[Callable[[], ToolParser]], Callable[[], ToolParser]]:
    """Register a parser class under ``name``."""

    def register(make: Callable[[], ToolParser]) -> Callable[[], ToolParser]:
        _PARSERS[name] = make
        return make

    return register


@cache
def _load_shipped() -> None:
    for module in _SHIPPED:
        importlib.import_module(f"{__name__}.{module}")  # registers itself


def tool_parsers() -> dict[str, ToolParser]:
    """Every registered parser by its name, in the names' order."""
    _load_shipped()
    return {name: _PARSERS[name]() for name in sorted(_PARSERS)}


def get_tool_parser(name: str) -> ToolParser:
    """The parser registered as ``name``.

    Raises:
        ConfigError: there is none; names those there are.
    """
    _load_shipped()
    known = _PARSERS.get(_ALIASES.get(name, name))
    if known is None:
        near = difflib.get_close_matches(name, [*_PARSERS, "auto"], n=1)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        raise ConfigError(f"no tool parser `{name}`; there are: {', '.join(sorted(_PARSERS))}, and auto.{hint}")
    return known()
