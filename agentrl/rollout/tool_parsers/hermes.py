"""Hermes calls, as Qwen2.5, Qwen3 and Hermes models write them: ``<tool_call>{"name": …, "arguments": {…}}</tool_call>``.

Lenient only where nothing can be misread: raw newlines inside JSON strings (code), ``arguments`` given as a JSON string,
a missing close tag after complete JSON. Everything else is a `ParseFailure` that tells the model what to change, because
a call that only this parser understands would fail wherever the model is deployed.
"""

from functools import partial

from agentrl.rollout.tool_parsers import FoundCall, tool_parser
from agentrl.rollout.tool_parsers.reading import (
    DECODER,
    body_of,
    call_of_object,
    calls_in_blocks,
    explain_json,
    failed,
    skip_space,
)

OPEN, CLOSE = "<tool_call>", "</tool_call>"
EXAMPLE = '{"name": "<tool>", "arguments": {…}}'


@tool_parser("hermes")
class HermesParser:
    """See the module's docstring."""

    name = "hermes"
    markers: tuple[str, ...] = ('{"name"', "<tool_call>")
    openers: tuple[str, ...] = (OPEN,)
    line_openers: tuple[str, ...] = ()
    closers: tuple[str, ...] = (CLOSE,)

    def find_calls(self, text: str, *, is_cut: bool = False) -> list[FoundCall]:
        """The calls of one turn. Calls the model only thought about, inside ``<think>``, are not calls."""
        read = partial(self._read, is_cut=is_cut)
        return calls_in_blocks(text, read, opening=OPEN, closing=CLOSE)

    def _read(self, text: str, start: int, *, is_cut: bool) -> tuple[FoundCall, int]:
        """One call whose body begins at ``start``; also returns where to go on."""
        begin = skip_space(text, start)
        try:
            value, end = DECODER.raw_decode(text, begin)
        except (ValueError, RecursionError) as error:
            body, after = body_of(text, start, opening=OPEN, closing=CLOSE)
            reason = explain_json(body, error, example=EXAMPLE, is_closed=after is not None, is_cut=is_cut, closing=CLOSE)
            return failed(reason, body), len(text) if after is None else after
        after = skip_space(text, end)
        if is_cut and CLOSE.startswith(text[after:]):
            after = len(text)
        if text.startswith(CLOSE, after) or after == len(text) or text.startswith(OPEN, after):
            hint = f"write one {OPEN} block per call"
            call = call_of_object(value, raw=text[begin:end], example=EXAMPLE, list_hint=hint)
            return call, after + len(CLOSE) if text.startswith(CLOSE, after) else after
        body, closed = body_of(text, start, opening=OPEN, closing=CLOSE)
        reason = f"extra text after the JSON object: {text[after : after + 60]!r}. Write one object between {OPEN} and {CLOSE}"
        return failed(reason, body), len(text) if closed is None else closed
