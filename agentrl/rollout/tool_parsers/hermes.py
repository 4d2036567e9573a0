"""Hermes calls, as Qwen2.5, Qwen3 and Hermes models write them: ``<tool_call>{"name": …, "arguments": {…}}</tool_call>``.

Lenient only where nothing can be misread: raw newlines inside JSON strings (code), ``arguments`` given as a JSON string,
a missing close tag after complete JSON. Everything else is a `ParseFailure` that tells the model what to change, because
a call that only this parser understands would fail wherever the model is deployed.
"""

import ast
import json
import re
import warnings
from typing import Any, NoReturn

from agentrl.rollout.tool_parsers import FoundCall, ParseFailure, tool_parser
from agentrl.types import ToolCall

OPEN, CLOSE = "<tool_call>", "</tool_call>"
EXAMPLE = '{"name": "<tool>", "arguments": {…}}'
MAX_CALLS = 64
"""Calls read from one turn; a turn that repeats itself thousands of times must not hold up the others."""
_MAX_RAW = 2000
"""Characters of a malformed call that are kept for people to read."""


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(strict=False, parse_constant=_no_constant)  # not strict: raw newlines in strings


@tool_parser("hermes")
class HermesParser:
    """See the module's docstring."""

    name = "hermes"

    def find_calls(self, text: str, *, is_cut: bool = False) -> list[FoundCall]:
        """The calls of one turn. Calls the model only thought about, inside ``<think>``, are not calls."""
        text = _spoken(text)
        found: list[FoundCall] = []
        position = 0
        while len(found) < MAX_CALLS:
            opening = text.find(OPEN, position)
            stray = text.find(CLOSE, position, opening if opening >= 0 else len(text))
            if stray >= 0:
                found.append(
                    ParseFailure(reason=f"{CLOSE} without {OPEN} before it", raw=text[position:stray][-_MAX_RAW:].strip())
                )
                position = stray + len(CLOSE)
                continue
            if opening < 0:
                return found
            call, position = self._read(text, opening + len(OPEN), is_cut=is_cut)
            found.append(call)
        return found

    def _read(self, text: str, start: int, *, is_cut: bool) -> tuple[FoundCall, int]:
        """One call whose body begins at ``start``; also returns where to go on."""
        begin = _skip_space(text, start)
        try:
            value, end = _DECODER.raw_decode(text, begin)
        except (ValueError, RecursionError) as error:
            body, after = _body(text, start)
            return ParseFailure(reason=_explain(body, error, is_closed=after is not None, is_cut=is_cut), raw=body[:_MAX_RAW]), (
                len(text) if after is None else after
            )
        after = _skip_space(text, end)
        if text.startswith(CLOSE, after):
            return _call(value, text[begin:end]), after + len(CLOSE)
        if after == len(text) or text.startswith(OPEN, after):
            return _call(value, text[begin:end]), after
        body, closed = _body(text, start)
        reason = f"extra text after the JSON object: {text[after : after + 60]!r}. Write one object between {OPEN} and {CLOSE}"
        return ParseFailure(reason=reason, raw=body[:_MAX_RAW]), len(text) if closed is None else closed


_SPACE = re.compile(r"\s*")


def _skip_space(text: str, start: int) -> int:
    match = _SPACE.match(text, start)
    return match.end() if match else start


def _spoken(text: str) -> str:
    """What follows the reasoning; nothing, where the reasoning never ended."""
    _, thought, spoken = text.rpartition("</think>")
    if thought:
        return spoken
    return text.partition("<think>")[0]


def _body(text: str, start: int) -> tuple[str, int | None]:
    """The text up to the close tag or the next open tag, and the position after it (None: the text ended first)."""
    close, opening = text.find(CLOSE, start), text.find(OPEN, start)
    if close >= 0 and (opening < 0 or close < opening):
        return text[start:close].strip(), close + len(CLOSE)
    if opening >= 0:
        return text[start:opening].strip(), opening
    return text[start:].strip(), None


def _call(value: Any, raw: str) -> FoundCall:
    def failure(reason: str) -> ParseFailure:
        return ParseFailure(reason=f"{reason}. Write {EXAMPLE}", raw=raw[:_MAX_RAW])

    if isinstance(value, list):
        return failure(f"found a list; write one {OPEN} block per call")
    if not isinstance(value, dict):
        return failure(f"found {_json_type(value)} where an object belongs")
    name = value.get("name")
    if not isinstance(name, str) or not name.strip():
        return failure('the key "name" is missing' if name is None else '"name" must be a non-empty string')
    unknown = [k for k in value if k not in ("name", "arguments", "id", "type")]
    if "arguments" not in value and unknown:
        return failure(f'the key "arguments" is missing (found {", ".join(json.dumps(k) for k in unknown[:4])})')
    arguments = value.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = _DECODER.decode(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            return failure('"arguments" is a string that is not a JSON object')
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        return failure(f'"arguments" must be an object, not {_json_type(arguments)}')
    try:
        json.dumps([name, arguments], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return failure("the text holds half of a surrogate pair; write the character itself")
    return ToolCall(name=name.strip(), arguments=arguments, raw=raw)


def _json_type(value: Any) -> str:
    return {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}.get(type(value), "null")


def _explain(body: str, error: Exception, *, is_closed: bool, is_cut: bool) -> str:
    if not is_closed and is_cut:
        return "the call was cut off by the token limit before it was complete. Write a shorter one"
    if not body:
        return f"the call is empty. Write {EXAMPLE}"
    if isinstance(error, RecursionError):
        return "the JSON is nested too deeply"
    if body.startswith("```"):
        return f"the call is wrapped in a code fence. Write the bare object: {EXAMPLE}"
    hint = _hint(body)
    where = ""
    if isinstance(error, json.JSONDecodeError):
        near = error.doc[max(0, error.pos - 20) : error.pos + 20]
        where = f"{error.msg} near {near!r}"
    reason = f"invalid JSON ({where or error})"
    if hint:
        reason += f": {hint}"
    elif not is_closed:
        reason += f": the object is not complete and {CLOSE} is missing"
    return f"{reason}. Write {EXAMPLE}"


def _hint(body: str) -> str:
    """The usual slips, by name."""
    if re.search(r",\s*[}\]]", body) and _is_json(re.sub(r",(\s*[}\]])", r"\1", body)):
        return "remove the comma before the closing bracket"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in the model's text are its business
            ast.literal_eval(body[:_MAX_RAW])
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        if re.search(r"[:\[,]\s*(True|False|None)\b", body):
            return "write true, false and null, not Python's True, False and None"
        if body.count("{") > body.count("}"):
            return "a closing brace is missing"
        return ""
    if re.search(r"[{,]\s*'", body) or re.search(r":\s*'", body):
        return "JSON strings need double quotes, not single quotes"
    return "this is a Python literal, not JSON (true, false, null; no trailing commas)"


def _is_json(text: str) -> bool:
    try:
        _DECODER.decode(text)
    except (ValueError, RecursionError):
        return False
    return True
