"""Calls of GLM-4.5 and later: ``<tool_call>NAME``, then pairs of ``<arg_key>`` and ``<arg_value>``, then ``</tool_call>``.

A value is text; the tool's schema turns it into a number, list or object.
"""

from functools import partial

from agentrl.rollout.tool_parsers import FoundCall, tool_parser
from agentrl.rollout.tool_parsers.reading import CUT, body_of, call_from, calls_in_blocks, failed, skip_space

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_KEY, _END_KEY, _VALUE, _END_VALUE = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"
EXAMPLE = f"{OPEN}tool\n{_KEY}key{_END_KEY}\n{_VALUE}value{_END_VALUE}\n{CLOSE}"


@tool_parser("glm")
class GlmParser:
    """See the module's docstring."""

    name = "glm"
    markers: tuple[str, ...] = (_KEY, _VALUE)
    openers: tuple[str, ...] = (OPEN,)
    line_openers: tuple[str, ...] = ()
    closers: tuple[str, ...] = (CLOSE,)

    def find_calls(self, text: str, *, is_cut: bool = False) -> list[FoundCall]:
        """The calls of one turn."""
        read = partial(self._read, is_cut=is_cut)
        return calls_in_blocks(text, read, opening=OPEN, closing=CLOSE)

    def _read(self, text: str, start: int, *, is_cut: bool) -> tuple[FoundCall, int]:
        """One call whose body begins at ``start``; also returns where to go on."""
        arguments: dict[str, str] = {}
        first = min((p for p in (text.find(m, start) for m in (_KEY, CLOSE, OPEN)) if p >= 0), default=len(text))
        name = text[start:first].strip()
        position, problem = first, ""
        while not problem and text.startswith(_KEY, position):
            end = text.find(_END_KEY, position)
            value = skip_space(text, end + len(_END_KEY))
            stop = text.find(_END_VALUE, value)
            key = text[position + len(_KEY) : end].strip()
            if end < 0:
                problem = f"{_END_KEY} is missing"
            elif not text.startswith(_VALUE, value):
                problem = f"{_VALUE} is missing after the key {key[:40]!r}"
            elif stop < 0:
                problem = f"{_END_VALUE} is missing after the value of {key[:40]!r}"
            elif key in arguments:
                problem = f"the key {key[:40]!r} is given twice"
            else:
                arguments[key] = text[value + len(_VALUE) : stop]
                position = skip_space(text, stop + len(_END_VALUE))
        is_closed = text.startswith(CLOSE, position)
        if not problem and not (is_closed or position == len(text) or text.startswith(OPEN, position)):
            problem = f"found {text[position : position + 40]!r} where {_KEY} or {CLOSE} belongs"
        if not problem and not is_closed and is_cut:
            problem = CUT  # the name alone, or the next pair, may be unfinished
        if not problem and not is_closed and not arguments:
            problem = f"{CLOSE} is missing"
        if not problem and name[:1] in ("{", "["):
            problem = "found JSON where the tool's name belongs"
        if not problem and (not name or len(name.split()) > 1):
            problem = f"the first line must be the tool's name alone, not {name[:40]!r}" if name else "the call has no name"
        if not problem:
            call = call_from(name, arguments, raw=text[start:position].strip(), example=EXAMPLE)
            return call, position + len(CLOSE) if is_closed else position
        body, after = body_of(text, position, opening=OPEN, closing=CLOSE)
        raw = (text[start:position] + body).strip()
        if problem != CUT:
            problem = CUT if after is None and is_cut else f"{problem}. Write\n{EXAMPLE}"
        return failed(problem, raw), len(text) if after is None else after
