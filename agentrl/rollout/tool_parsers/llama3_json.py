"""Llama 3 calls: ``{"name": …, "parameters": {…}}`` as the turn, several separated by ``;``, perhaps after ``<|python_tag|>``.

Without the tag nothing marks a call, so a turn is only read as one where an object with a ``"name"`` begins it or one of
its lines; any other JSON is an answer. ``<|python_tag|>tool.call(key="value")``, the form of Llama's built-in tools, is
read too.
"""

import re

from agentrl.rollout.tool_parsers import FoundCall, tool_parser
from agentrl.rollout.tool_parsers.python_calls import read_call
from agentrl.rollout.tool_parsers.reading import DECODER, MAX_CALLS, call_of_object, explain_json, failed, skip_space, spoken

TAG = "<|python_tag|>"
EXAMPLE = '{"name": "<tool>", "parameters": {…}}'
_KEYS = ("parameters", "arguments")
_OPENING = re.compile(r"""(?:^|(?<=</think>))[ \t]*(\{\s*["'](?:name|type)["']\s*:)""", re.MULTILINE)
_CALLS = re.compile(rf"{re.escape(TAG)}|{_OPENING.pattern}", re.MULTILINE)
_BUILT_IN = re.compile(r"\s*([A-Za-z_][\w.]*?)\.call(?=\()")
_IS_CALL = re.compile(r"""["'](?:name|function)["']""")


@tool_parser("llama3_json")
class Llama3JsonParser:
    """See the module's docstring."""

    name = "llama3_json"
    markers: tuple[str, ...] = ('"parameters": dictionary of argument', TAG, '"parameters": ')
    openers: tuple[str, ...] = (TAG,)
    line_openers: tuple[str, ...] = ("{",)
    closers: tuple[str, ...] = ("}",)

    def find_calls(self, text: str, *, is_cut: bool = False) -> list[FoundCall]:
        """The calls of one turn."""
        text = spoken(text, _CALLS)
        first = _CALLS.search(text)
        if first is None:
            return []
        if first.group(1) is None:
            return self._tagged(text[first.end() :], is_cut=is_cut)
        return self._objects(text, first.start(1), is_cut=is_cut)

    def _tagged(self, text: str, *, is_cut: bool) -> list[FoundCall]:
        built_in = _BUILT_IN.match(text)
        if built_in:
            call, _ = read_call(text, built_in.end(), name=built_in.group(1), is_cut=is_cut)
            return [call]
        start = skip_space(text, 0)
        if text.startswith("{", start):
            return self._objects(text, start, is_cut=is_cut)
        if is_cut and start == len(text):
            return [failed(f"nothing follows {TAG}: the turn was cut off by the token limit", "")]
        return [failed(f"what follows {TAG} is no call. Write {EXAMPLE}", text[start:])]

    def _objects(self, text: str, start: int, *, is_cut: bool) -> list[FoundCall]:
        """Objects from ``start`` on, separated by semicolons or nothing but white space."""
        found: list[FoundCall] = []
        while len(found) < MAX_CALLS:
            try:
                value, end = DECODER.raw_decode(text, start)
            except (ValueError, RecursionError) as error:
                body, separator, _ = text[start:].partition("};")
                body += separator[:1]
                reason = explain_json(
                    body.strip(), error, example=EXAMPLE, is_closed=bool(separator), is_cut=is_cut, closing="its last brace"
                )
                found.append(failed(reason, body))
                if not separator:
                    return found
                end = start + len(body)
            else:
                if not found and isinstance(value, dict) and not _IS_CALL.search(text, start, end):
                    return []  # {"type": "circle", …}: an answer in JSON
                found.append(call_of_object(value, raw=text[start:end], example=EXAMPLE, keys=_KEYS))
            end = skip_space(text, end)
            is_separated = text.startswith(";", end)
            start = skip_space(text, end + is_separated)
            if start == len(text):
                return found
            if text.startswith(TAG, start):
                start = skip_space(text, start + len(TAG))
            if not text.startswith("{", start):
                reason = f"extra text after the call: {text[start : start + 60]!r}. Write nothing but the call: {EXAMPLE}"
                found.append(failed(reason, text[start:]))
                return found
        return found
