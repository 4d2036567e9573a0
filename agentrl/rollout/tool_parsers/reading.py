"""What the formats share: where speech begins, JSON as models write it, and reasons that say what to change.

Everything here is linear in the text: a turn that repeats itself thousands of times must not hold up other rollouts.
"""

import ast
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NoReturn

from agentrl.rollout.tool_parsers import FoundCall, ParseFailure
from agentrl.types import ToolCall

MAX_CALLS = 64
"""Calls read from one turn."""
MAX_RAW = 2000
"""Characters of a malformed call that are kept for people to read."""
CUT = "the call was cut off by the token limit before it was complete. Write a shorter one"
THINK, END_THINK = "<think>", "</think>"
REASONING = {THINK: END_THINK}
_SPACE = re.compile(r"\s*")
_MAX_NAME = 256


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(written: str) -> float:
    number = float(written)
    if not math.isfinite(number):  # no JSON could say it again
        raise ValueError(f"{written[:40]} is too large a number")
    return number


# Not strict: raw newlines in strings (code).
DECODER = json.JSONDecoder(strict=False, parse_constant=_no_constant, parse_float=_finite)


def skip_space(text: str, start: int) -> int:
    """The first position from ``start`` on that is no white space."""
    match = _SPACE.match(text, start)
    return match.end() if match else start


def spoken(text: str, calls: re.Pattern[str], reasoning: Mapping[str, str] = REASONING) -> str:
    """What is said in a turn (`speech_span`)."""
    start, end = speech_span(text, calls, reasoning)
    return text[start:end]


def speech_span(text: str, calls: re.Pattern[str], reasoning: Mapping[str, str]) -> tuple[int, int]:
    """Where what follows the reasoning begins and ends; calls inside reasoning are not calls.

    Read from the left, so that nothing that comes later changes what was a call: behind the first call that is spoken, tags of
    reasoning are text, because a call's arguments may hold them (prompts, code). Reasoning that the prompt opened ends with a
    closing tag before any call.

    Args:
        text: one turn.
        calls: with what a call begins. A line that begins behind a closing tag is a line of its own.
        reasoning: the tags that begin reasoning, each with the one that ends it.
    """
    if not reasoning:
        return 0, len(text)
    openings = any_of(tuple(reasoning))
    position, call = 0, -1
    while True:
        if call < position:
            match = calls.search(text, position)
            call = match.start() if match else len(text)
        opened = openings.search(text, position, call)
        if opened is None:
            ends = [place + len(tag) for tag in reasoning.values() if (place := text.rfind(tag, position, call)) >= 0]
            return max(ends, default=position), len(text)
        closing = reasoning[opened.group()]
        end = text.find(closing, opened.end())
        if end < 0:
            return position, opened.start()
        position = end + len(closing)


@cache
def any_of(marks: Sequence[str]) -> re.Pattern[str]:
    """One of these strings."""
    return re.compile("|".join(map(re.escape, marks)) or "(?!)")


def body_of(text: str, start: int, *, opening: str, closing: str) -> tuple[str, int | None]:
    """The text up to the closing or the next opening marker, and the position to go on from (None: the text ended first)."""
    close, again = text.find(closing, start), text.find(opening, start)
    if close >= 0 and (again < 0 or close < again):
        return text[start:close].strip(), close + len(closing)
    if again >= 0:
        return text[start:again].strip(), again
    return text[start:].strip(), None


def calls_in_blocks(
    text: str,
    read: Callable[[str, int], tuple[FoundCall, int]],
    *,
    opening: str,
    closing: str,
    inner: str | None = None,
    example: str = "",
) -> list[FoundCall]:
    """The calls of a turn in which each stands between two markers.

    A turn may think again between its calls; what stands in an open ``<think>`` was never spoken.

    Args:
        text: one turn.
        read: one call whose body begins at this position; also returns where to go on.
        opening: the marker before a call.
        closing: the marker behind it.
        inner: what begins a body in this format; outside of one it is a call that lacks ``opening``.
        example: a well-formed call, shown where that happened.
    """
    text = spoken(text, any_of((opening, inner) if inner is not None else (opening,)))
    found: list[FoundCall] = []
    position, start = 0, 0
    while len(found) < MAX_CALLS:
        start = text.find(opening, position) if 0 <= start <= position else start
        thought = text.find(THINK, position, start if start >= 0 else len(text))
        before = thought if thought >= 0 else start if start >= 0 else len(text)
        bare = text.find(inner, position, before) if inner is not None else -1
        stray = text.find(closing, position, before)
        if bare >= 0:
            body, after = body_of(text, bare, opening=opening, closing=closing)
            found.append(failed(f"{opening} is missing before {inner}…>. Write\n{example}", body))
            position = len(text) if after is None else after
        elif stray >= 0:
            found.append(failed(f"{closing} without {opening} before it", text[position:stray][-MAX_RAW:].strip()))
            position = stray + len(closing)
        elif thought >= 0:
            position = text.find(END_THINK, thought)
            if position < 0:
                return found
        elif start < 0:
            return found
        else:
            call, position = read(text, start + len(opening))
            found.append(call)
    return found


def failed(reason: str, raw: str) -> ParseFailure:
    """A failure that keeps only so much of the text."""
    return ParseFailure(reason=reason, raw=raw[:MAX_RAW])


def call_from(name: Any, arguments: Any, *, raw: str, example: str, key: str = "arguments", call_id: str = "") -> FoundCall:
    """A call of decoded parts; ``arguments`` may be missing (None), an object, or a string that holds one.

    Args:
        name: what stands where the tool's name belongs.
        arguments: what stands where the arguments belong.
        raw: the call's text.
        example: a well-formed call, shown with a failure.
        key: what the format calls the arguments.
        call_id: the id that the model gave the call.
    """
    if not isinstance(name, str) or not name.strip():
        reason = 'the key "name" is missing' if name is None else '"name" must be a non-empty string'
        return failed(f"{reason}. Write {example}", raw)
    if len(name) > _MAX_NAME:
        return failed(f"the tool's name has {len(name)} characters. Write {example}", raw)
    if isinstance(arguments, str):
        try:
            arguments = DECODER.decode(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            return failed(f'"{key}" is a string that is not a JSON object. Write {example}', raw)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        return failed(f'"{key}" must be an object, not {json_type(arguments)}. Write {example}', raw)
    try:
        if "\\" in raw or not raw.isascii():  # otherwise nothing can have spelled one
            json.dumps([name, arguments], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return failed(f"the text holds half of a surrogate pair; write the character itself. Write {example}", raw)
    return ToolCall(name=name.strip(), arguments=arguments, raw=raw, id=call_id)


def call_of_object(value: Any, *, raw: str, example: str, keys: Sequence[str] = ("arguments",), list_hint: str = "") -> FoundCall:
    """A call of one decoded ``{"name": …, "arguments": {…}}``.

    Args:
        value: the decoded JSON.
        raw: its text.
        example: a well-formed call, shown with a failure.
        keys: names for the arguments that the format knows; the first is the proper one.
        list_hint: what to do instead of a list.
    """
    if not isinstance(value, dict):
        what = f"found a list; {list_hint}" if isinstance(value, list) and list_hint else None
        return failed(f"{what or f'found {json_type(value)} where an object belongs'}. Write {example}", raw)
    known = next((k for k in keys if k in value), None)
    unknown = [str(k) for k in value if k not in ("name", "id", "type", *keys)]
    if isinstance(value.get("name"), str) and known is None and unknown:
        found = ", ".join(json.dumps(k) for k in unknown[:4])
        return failed(f'the key "{keys[0]}" is missing (found {found}). Write {example}', raw)
    identifier = value.get("id")
    return call_from(
        value.get("name"),
        None if known is None else value[known],
        raw=raw,
        example=example,
        key=known or keys[0],
        call_id=identifier if isinstance(identifier, str) else "",
    )


def json_type(value: Any) -> str:
    """In words for the model."""
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return kinds.get(type(value), "null")


def explain_json(body: str, error: Exception, *, example: str, is_closed: bool, is_cut: bool, closing: str) -> str:
    """Why ``body`` is no JSON and what to change.

    Args:
        body: the text where an object belongs.
        error: what the decoder raised.
        example: a well-formed call.
        is_closed: ``closing`` follows the body.
        is_cut: the turn ended at a token limit.
        closing: the marker that ends a call.
    """
    if not is_closed and is_cut:
        return CUT
    if not body:
        return f"the call is empty. Write {example}"
    if isinstance(error, RecursionError):
        return "the JSON is nested too deeply"
    if body.startswith("```"):
        return f"the call is wrapped in a code fence. Write the bare object: {example}"
    hint = _hint(body)
    where = ""
    if isinstance(error, json.JSONDecodeError):
        near = error.doc[max(0, error.pos - 20) : error.pos + 20]
        where = f"{error.msg} near {near!r}"
    reason = f"invalid JSON ({where or error})"
    if hint:
        reason += f": {hint}"
    elif not is_closed:
        reason += f": the object is not complete and {closing} is missing"
    return f"{reason}. Write {example}"


def _hint(body: str) -> str:
    """The usual slips, by name."""
    if re.search(r",\s*[}\]]", body) and _is_json(re.sub(r",(\s*[}\]])", r"\1", body)):
        return "remove the comma before the closing bracket"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in the model's text are its business
            ast.literal_eval(body[:MAX_RAW])
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
        DECODER.decode(text)
    except (ValueError, RecursionError):
        return False
    return True
