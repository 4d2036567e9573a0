"""Pythonic calls: ``[f(a=1), g(b="x")]``, as Llama 3.2, Llama 4 and LFM2 write them, or one call a line as in OLMo 3.

Where the model has markers (``<|python_start|>``, ``<|tool_call_start|>``, ``<function_calls>``) the calls stand between
them. Without, the list must begin a line and end the turn, so that ``[f(x)]`` in a sentence stays text.
"""

import re

from agentrl.rollout.tool_parsers import FoundCall, tool_parser
from agentrl.rollout.tool_parsers.python_calls import EXAMPLE, extent, name_at, read_call
from agentrl.rollout.tool_parsers.reading import CUT, MAX_CALLS, failed, skip_space, spoken

BLOCKS = (
    ("<|python_start|>", "<|python_end|>"),
    ("<|tool_call_start|>", "<|tool_call_end|>"),
    ("<function_calls>", "</function_calls>"),
)
_BARE = re.compile(r"(?:^|(?<=</think>))[ \t]*(\[\s*[A-Za-z_][\w.\-]*\()", re.MULTILINE)
_MARKS = re.compile("|".join(re.escape(mark) for block in BLOCKS for mark in block))
_CALLS = re.compile(f"{_MARKS.pattern}|{_BARE.pattern}", re.MULTILINE)
_MAX_BARE = 32
"""Lines that look like a list of calls and are tried, from the last one upwards."""


@tool_parser("pythonic")
class PythonicParser:
    """See the module's docstring."""

    name = "pythonic"
    markers: tuple[str, ...] = ("<|tool_call_start|>", "<|python_start|>", "<function_calls>", "[func_name1(")
    openers: tuple[str, ...] = tuple(mark for block in BLOCKS for mark in block)
    line_openers: tuple[str, ...] = ("[",)
    closers: tuple[str, ...] = tuple(closing for _, closing in BLOCKS)

    def find_calls(self, text: str, *, is_cut: bool = False) -> list[FoundCall]:
        """The calls of one turn."""
        text = spoken(text, _CALLS)
        mark = _MARKS.search(text)
        if mark is not None:  # the first one's family; another's is text
            opening, closing = next(block for block in BLOCKS if mark.group() in block)
            return self._blocks(text, opening, closing, is_cut=is_cut)
        starts = [match.start(1) for match in _BARE.finditer(text)]
        if not starts:
            return []
        for start in starts[-_MAX_BARE:]:
            end = extent(text, start).end
            if end is not None and skip_space(text, end) == len(text):
                return self._calls(text, start, len(text), is_cut=is_cut, closing="]")
        if starts[0] == skip_space(text, 0):  # the turn begins with a call and goes on, or breaks off
            return self._calls(text, starts[0], len(text), is_cut=is_cut, closing="]")
        if is_cut and extent(text, starts[-1]).end is None:
            return [failed(CUT, text[starts[-1] :])]
        return []

    def _blocks(self, text: str, opening: str, closing: str, *, is_cut: bool) -> list[FoundCall]:
        found: list[FoundCall] = []
        position = 0
        while len(found) < MAX_CALLS:
            start = text.find(opening, position)
            if start < 0:
                if position == 0:
                    found.append(failed(f"{closing} without {opening} before it", text))
                return found
            start += len(opening)
            end = text.find(closing, start)
            again = text.find(opening, start)
            position = min((p for p in (end, again) if p >= 0), default=len(text))
            found += self._calls(text, start, position, is_cut=is_cut and position == len(text), closing=closing)
            if position == end:
                position += len(closing)
        return found[:MAX_CALLS]

    def _calls(self, text: str, start: int, stop: int, *, is_cut: bool, closing: str) -> list[FoundCall]:
        """Calls between ``start`` and ``stop``, with or without brackets around them."""
        text = text[:stop]
        position = skip_space(text, start)
        is_list = text.startswith("[", position)
        position = skip_space(text, position + is_list)
        found: list[FoundCall] = []
        while len(found) < MAX_CALLS:
            if is_list and text.startswith("]", position):
                position = skip_space(text, position + 1)
                if position < len(text):
                    reason = f"extra text after the calls: {text[position : position + 60]!r}. Write nothing but {EXAMPLE}"
                    found.append(failed(reason, text[start:]))
                elif not found:
                    found.append(failed(f"the list of calls is empty. Write {EXAMPLE}", text[start:]))
                return found
            if position == len(text):
                if is_list or not found:
                    reason = CUT if is_cut else f"the calls are not complete: {closing} is missing. Write {EXAMPLE}"
                    found.append(failed(reason, text[start:]))
                return found
            name = name_at(text, position)
            if name is None:
                reason = f"no call stands at {text[position : position + 40]!r}. Write {EXAMPLE}"
                found.append(failed(CUT if is_cut else reason, text[position:]))
                return found
            call, end = read_call(text, name.end(), name=name.group(), is_cut=is_cut)
            found.append(call)
            if end is None:
                return found
            position = skip_space(text, end)
            if text.startswith((",", ";"), position):
                position = skip_space(text, position + 1)
        return found
