"""Calls in XML, as Qwen3-Coder and Qwen3.5 write them.

``<tool_call>`` ``<function=NAME>`` ``<parameter=KEY>`` value ``</parameter>`` … ``</function>`` ``</tool_call>``, each on its
own line. A value is text without the line breaks next to its tags; the tool's schema turns it into a number, list or object.
"""

import re
from functools import partial

from agentrl.rollout.tool_parsers import FoundCall, tool_parser
from agentrl.rollout.tool_parsers.reading import CUT, body_of, call_from, calls_in_blocks, failed, skip_space

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION, _END_FUNCTION = "<function=", "</function>"
_PARAMETER, _END_PARAMETER = "<parameter=", "</parameter>"
EXAMPLE = f"{OPEN}\n{_FUNCTION}tool>\n{_PARAMETER}key>\nvalue\n{_END_PARAMETER}\n{_END_FUNCTION}\n{CLOSE}"
_HEAD = re.compile(r"([^<>\n]{0,256})>")


@tool_parser("qwen3_coder")
class Qwen3CoderParser:
    """See the module's docstring."""

    name = "qwen3_coder"
    markers: tuple[str, ...] = (_FUNCTION, _PARAMETER)
    openers: tuple[str, ...] = (OPEN, _FUNCTION)
    line_openers: tuple[str, ...] = ()
    closers: tuple[str, ...] = (CLOSE,)

    def find_calls(self, text: str, *, is_cut: bool = False) -> list[FoundCall]:
        """The calls of one turn."""
        read = partial(self._read, is_cut=is_cut)
        return calls_in_blocks(text, read, opening=OPEN, closing=CLOSE, inner=_FUNCTION, example=EXAMPLE)

    def _read(self, text: str, start: int, *, is_cut: bool) -> tuple[FoundCall, int]:
        """One call whose body begins at ``start``; also returns where to go on."""
        try:
            return self._parsed(text, start)
        except _Malformed as error:
            body, after = body_of(text, max(start, error.position), opening=OPEN, closing=CLOSE)
            body = (text[start : error.position] + body).strip() if error.position > start else body
            if after is None and is_cut:
                return failed(CUT, body), len(text)
            reason = f"the call is empty. Write\n{EXAMPLE}" if not body else f"{error}. Write\n{EXAMPLE}"
            return failed(reason, body), len(text) if after is None else after

    def _parsed(self, text: str, start: int) -> tuple[FoundCall, int]:
        position = skip_space(text, start)
        if not text.startswith(_FUNCTION, position):
            near = text[position : position + 40]
            raise _Malformed(f"found {near!r} where {_FUNCTION}tool> belongs", position)
        name, position = _head(text, position + len(_FUNCTION), _FUNCTION)
        if not name:
            raise _Malformed("the function has no name", position)
        arguments: dict[str, str] = {}
        while True:
            position = skip_space(text, position)
            if text.startswith(_PARAMETER, position):
                key, position = _head(text, position + len(_PARAMETER), _PARAMETER)
                end = text.find(_END_PARAMETER, position)
                if end < 0:
                    raise _Malformed(f"{_END_PARAMETER} is missing after the value of {key!r}", position)
                if key in arguments:
                    raise _Malformed(f"the parameter {key!r} is given twice", end)
                value = text[position:end]
                arguments[key] = value.removeprefix("\n").removesuffix("\n")
                position = end + len(_END_PARAMETER)
            elif text.startswith(_END_FUNCTION, position):
                break
            else:
                near = text[position : position + 40]
                raise _Malformed(f"found {near!r} where {_PARAMETER}key> or {_END_FUNCTION} belongs", position)
        position = skip_space(text, position + len(_END_FUNCTION))
        raw = text[start:position].strip()
        if text.startswith(CLOSE, position):
            return call_from(name, arguments, raw=raw, example=EXAMPLE), position + len(CLOSE)
        if position == len(text) or text.startswith(OPEN, position):
            return call_from(name, arguments, raw=raw, example=EXAMPLE), position
        raise _Malformed(f"extra text after {_END_FUNCTION}: {text[position : position + 40]!r}", position)


class _Malformed(Exception):
    """What is wrong with a call, and where reading stopped."""

    def __init__(self, reason: str, position: int) -> None:
        super().__init__(reason)
        self.position = position


def _head(text: str, start: int, what: str) -> tuple[str, int]:
    """The name up to ``>``, and the position after it."""
    match = _HEAD.match(text, start)
    if match is None:
        raise _Malformed(f"'>' is missing after {what}{text[start : start + 30]!r}", start)
    return match.group(1).strip().strip("\"'"), match.end()
