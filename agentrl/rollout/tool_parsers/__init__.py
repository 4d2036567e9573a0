"""Find tool calls in sampled text, one file per format. The text was decoded for this only and is never encoded again."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
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

    def find_calls(self, text: str, *, is_cut: bool = False) -> list[FoundCall]:
        """The calls in ``text``, in order, with a `ParseFailure` for each that is malformed.

        Args:
            text: one assistant turn, decoded, without its end-of-turn token.
            is_cut: the turn ended at a token limit, so its last call may be incomplete.
        """
        ...


_PARSERS: dict[str, Callable[[], ToolParser]] = {}


def tool_parser(name: str) -> Callable[[Callable[[], ToolParser]], Callable[[], ToolParser]]:
    """Register a parser class under ``name``."""

    def register(make: Callable[[], ToolParser]) -> Callable[[], ToolParser]:
        _PARSERS[name] = make
        return make

    return register


def get_tool_parser(name: str) -> ToolParser:
    """The parser registered as ``name``.

    Raises:
        ConfigError: there is none; names those there are.
    """
    import agentrl.rollout.tool_parsers.hermes  # noqa: F401  # pyright: ignore[reportUnusedImport]  # registers itself

    if name not in _PARSERS:
        near = difflib.get_close_matches(name, _PARSERS, n=1)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        raise ConfigError(f"no tool parser `{name}`; there are: {', '.join(sorted(_PARSERS))}.{hint}")
    return _PARSERS[name]()
