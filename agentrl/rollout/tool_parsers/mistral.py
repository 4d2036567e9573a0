"""Mistral's calls: ``[TOOL_CALLS] [{"name": …, "arguments": {…}}]``, or ``[TOOL_CALLS]name[ARGS]{…}`` from 2025 on.

The marker is a token that some detokenizers drop, so a turn that is nothing but such a list (or begins with ``name[ARGS]{``)
is read as calls too.
"""

import re
from collections.abc import Mapping

from agentrl.rollout.tool_parsers import FoundCall, ParseFailure, tool_parser
from agentrl.rollout.tool_parsers.reading import (
    CUT,
    DECODER,
    MAX_CALLS,
    REASONING,
    call_from,
    call_of_object,
    explain_json,
    failed,
    skip_space,
    spoken,
)

MARKER, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
LIST_EXAMPLE = f'{MARKER} [{{"name": "<tool>", "arguments": {{…}}}}]'
ARGS_EXAMPLE = f"{MARKER}<tool>{ARGS}{{…}}"
_NAMED = re.compile(r"\s*([\w.\-]{1,256})\s*(?:\[CALL_ID\]\s*(\w{0,64})\s*)?\[ARGS\]")
_BARE_LIST = re.compile(r'\s*\[\s*\{\s*"name"\s*:')
_CALLS = re.compile(rf'{re.escape(MARKER)}|{re.escape(ARGS)}|\[\s*\{{\s*"name"\s*:')


@tool_parser("mistral")
class MistralParser:
    """See the module's docstring."""

    name = "mistral"
    markers: tuple[str, ...] = (MARKER, ARGS)
    openers: tuple[str, ...] = (MARKER, ARGS)
    line_openers: tuple[str, ...] = ("[",)
    closers: tuple[str, ...] = (MARKER,)  # the next call's: what follows a call can make it malformed
    reasoning: Mapping[str, str] = {**REASONING, "[THINK]": "[/THINK]"}  # noqa: RUF012

    def find_calls(self, text: str, *, is_cut: bool = False) -> list[FoundCall]:
        """The calls of one turn."""
        text = spoken(text, _CALLS, self.reasoning)
        if MARKER not in text:
            if _NAMED.match(text):
                return self._block(text, is_cut=is_cut)
            if not _BARE_LIST.match(text):
                return []
            found = self._block(text, is_cut=is_cut)
            return found if is_cut or not any(isinstance(call, ParseFailure) for call in found) else []
        blocks = text.split(MARKER, MAX_CALLS + 1)[1 : MAX_CALLS + 1]
        found: list[FoundCall] = []
        for index, block in enumerate(blocks):
            found += self._block(block, is_cut=is_cut and index == len(blocks) - 1)
        return found[:MAX_CALLS]

    def _block(self, text: str, *, is_cut: bool) -> list[FoundCall]:
        """What follows one marker."""
        start = skip_space(text, 0)
        if text.startswith("[", start):
            return self._list(text, start, is_cut=is_cut)
        named = _NAMED.match(text)
        if named is not None:
            return self._named(text, named, is_cut=is_cut)
        if is_cut:
            return [failed(CUT, text)]
        if text.startswith("{", start):
            return [failed(f"the calls must be a list, with [ and ] around them. Write {LIST_EXAMPLE}", text)]
        example = ARGS_EXAMPLE if re.match(r"\s*[\w.\-]+\s*\{", text) else f"{LIST_EXAMPLE} or {ARGS_EXAMPLE}"
        return [failed(f"found {text[start : start + 40]!r} after {MARKER}. Write {example}", text)]

    def _list(self, text: str, start: int, *, is_cut: bool) -> list[FoundCall]:
        """``[{…}, {…}]``. What follows a broken element is not read: its braces could be taken for a call's."""
        found: list[FoundCall] = []
        position = skip_space(text, start + 1)
        while len(found) < MAX_CALLS:
            if text.startswith("]", position):
                rest = skip_space(text, position + 1)
                if rest < len(text):
                    found.append(
                        failed(f"extra text after the list: {text[rest : rest + 60]!r}. End the turn there", text[rest:])
                    )
                elif not found:
                    found.append(failed(f"the list of calls is empty. Write {LIST_EXAMPLE}", text[start:]))
                return found
            try:
                value, end = DECODER.raw_decode(text, position)
            except (ValueError, RecursionError) as error:
                body = text[position:].strip()
                reason = explain_json(body, error, example=LIST_EXAMPLE, is_closed=not is_cut, is_cut=is_cut, closing="]")
                found.append(failed(reason if body else self._open_list(is_cut=is_cut), body))
                return found
            found.append(call_of_object(value, raw=text[position:end], example=LIST_EXAMPLE, list_hint="lists do not nest"))
            position = skip_space(text, end)
            if text.startswith(",", position):
                position = skip_space(text, position + 1)
            elif position == len(text) and not is_cut:
                return found  # only the last bracket is missing: nothing can be misread
            elif not text.startswith("]", position):
                reason = f"found {text[position : position + 40]!r} where , or ] belongs. Write {LIST_EXAMPLE}"
                found.append(failed(self._open_list(is_cut=True) if is_cut else reason, text[position:]))
                return found
        return found

    @staticmethod
    def _open_list(*, is_cut: bool) -> str:
        return CUT if is_cut else f"the list of calls is not closed. Write {LIST_EXAMPLE}"

    def _named(self, text: str, named: re.Match[str], *, is_cut: bool) -> list[FoundCall]:
        begin = skip_space(text, named.end())
        name, call_id = named.group(1), named.group(2) or ""
        try:
            value, end = DECODER.raw_decode(text, begin)
        except (ValueError, RecursionError) as error:
            body = text[begin:].strip()
            reason = explain_json(body, error, example=ARGS_EXAMPLE, is_closed=not is_cut, is_cut=is_cut, closing="}")
            return [failed(reason, f"{name}{ARGS}{body}")]
        raw = text[named.start(1) : end]
        if not isinstance(value, dict):
            return [failed(f"the arguments must be an object. Write {ARGS_EXAMPLE}", raw)]
        rest = skip_space(text, end)
        if rest == len(text):
            return [call_from(name, value, raw=raw, example=ARGS_EXAMPLE, call_id=call_id)]
        return [failed(f"extra text after the arguments: {text[rest : rest + 60]!r}. Write {ARGS_EXAMPLE}", text[begin:])]
