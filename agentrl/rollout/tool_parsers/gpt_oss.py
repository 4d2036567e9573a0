"""Calls of gpt-oss, in the harmony format: a message to ``functions.NAME`` whose text is the JSON of the arguments.

A turn is one or more messages: ``<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>commentary
to=functions.NAME <|constrain|>json<|message|>{…}<|call|>``. The recipient stands in a message's header, before or after the
channel; text that merely mentions one is no call. Reasoning is the analysis channel.
"""

import re
from collections.abc import Mapping

from agentrl.rollout.tool_parsers import FoundCall, tool_parser
from agentrl.rollout.tool_parsers.reading import CUT, DECODER, MAX_CALLS, call_from, explain_json, failed, skip_space

MESSAGE = "<|message|>"
PREFIX = "functions."
EXAMPLE = f"<|channel|>commentary to={PREFIX}tool <|constrain|>json{MESSAGE}{{…}}<|call|>"
_ENDS = re.compile(r"<\|(?:end|call|return|start)\|>")
_RECIPIENT = re.compile(r"\bto=([^\s<]{1,256})")
_DROPPED = re.compile(r"commentary to=functions\.([\w.\-]{1,256}) ?(?:json)?(?=\s*\{)")
"""A header after a detokenizer dropped its control tokens."""


@tool_parser("gpt_oss")
class GptOssParser:
    """See the module's docstring."""

    name = "gpt_oss"
    markers: tuple[str, ...] = ("<|channel|>", "to=functions.", "<|call|>")
    openers: tuple[str, ...] = ("<|start|>assistant to=", "<|channel|>commentary", " to=functions.", "commentary to=functions.")
    line_openers: tuple[str, ...] = ()
    closers: tuple[str, ...] = ("<|call|>", "<|end|>")
    reasoning: Mapping[str, str] = {}  # noqa: RUF012  # it has a channel

    def find_calls(self, text: str, *, is_cut: bool = False) -> list[FoundCall]:
        """The calls of one turn."""
        if "<|" not in text:
            return self._without_tokens(text, is_cut=is_cut)
        found: list[FoundCall] = []
        position = 0
        while len(found) < MAX_CALLS and position < len(text):
            end = _ENDS.search(text, position)
            stop = end.start() if end else len(text)
            header, message, body = text[position:stop].partition(MESSAGE)
            position = end.end() if end else len(text)
            recipient = _RECIPIENT.search(header)
            if recipient is not None and "<|channel|>final" not in header:
                is_open = end is None
                found += self._read(recipient.group(1), header, message, body, is_cut=is_cut and is_open, is_closed=not is_open)
        return found

    def _read(self, recipient: str, header: str, message: str, body: str, *, is_cut: bool, is_closed: bool) -> list[FoundCall]:
        if not message:
            reason = CUT if is_cut else f"{MESSAGE} is missing before the arguments. Write {EXAMPLE}"
            return [failed(reason, header)]
        if recipient in ("all", "assistant", "user"):
            return []
        raw = f"to={recipient}{MESSAGE}{body}"
        if not recipient.startswith(PREFIX):
            return [failed(f"there is no recipient {recipient[:80]!r}; tools are called to={PREFIX}tool. Write {EXAMPLE}", raw)]
        return [_call(recipient.removeprefix(PREFIX), body, is_cut=is_cut, is_closed=is_closed)]

    def _without_tokens(self, text: str, *, is_cut: bool) -> list[FoundCall]:
        header = _DROPPED.search(text)
        if header is None:
            return []
        return [_call(header.group(1), text[header.end() :], is_cut=is_cut, is_closed=not is_cut)]


def _call(name: str, body: str, *, is_cut: bool, is_closed: bool) -> FoundCall:
    begin = skip_space(body, 0)
    try:
        value, end = DECODER.raw_decode(body, begin)
    except (ValueError, RecursionError) as error:
        reason = explain_json(body.strip(), error, example=EXAMPLE, is_closed=is_closed, is_cut=is_cut, closing="<|call|>")
        return failed(reason, body)
    rest = skip_space(body, end)
    if rest < len(body):
        return failed(f"extra text after the arguments: {body[rest : rest + 60]!r}. Write {EXAMPLE}", body)
    if not isinstance(value, dict):
        return failed(f"the arguments must be one JSON object. Write {EXAMPLE}", body)
    return call_from(name, value, raw=body.strip(), example=EXAMPLE)
