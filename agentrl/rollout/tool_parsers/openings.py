"""Where the markup of calls begins in a turn, also in one that is still being sampled."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from agentrl.rollout.tool_parsers import ToolParser
from agentrl.rollout.tool_parsers.reading import REASONING, speech_span


def first_of(text: str, mark: str, start: int) -> int:
    """Where ``mark`` stands in ``text`` from ``start`` on, or the end of the text begins it, so that it may yet come; else its length."""
    found = text.find(mark, start)
    if found >= 0:
        return found
    for length in range(min(len(mark) - 1, len(text) - start), 0, -1):
        if text.endswith(mark[:length]):
            return len(text) - length
    return len(text)


class Place(NamedTuple):
    """A position in a turn."""

    position: int
    closing: str
    """The tag that ends the reasoning in which it stands, and in which markup is text; empty outside of reasoning."""


class Openings:
    """Of one format.

    Args:
        parser: of the format; None where no calls are looked for.
        thinking: what the prompt opened on the model's behalf: turns begin in reasoning.
    """

    def __init__(self, parser: ToolParser | None, *, thinking: str = "") -> None:
        self._marks = parser.openers if parser is not None else ()
        self._line_starts = parser.line_openers if parser is not None else ()
        self._thinking = thinking
        self._reasoning: Mapping[str, str] = getattr(parser, "reasoning", REASONING)
        begins = "|".join(["^", *(f"(?<={re.escape(tag)})" for tag in self._reasoning.values())])
        lines = "|".join(map(re.escape, self._line_starts)) or "(?!)"
        self._line_marks = re.compile(rf"(?:{begins})[ \t]*({lines})", re.MULTILINE)
        self._all_marks = re.compile("|".join([*map(re.escape, self._marks), self._line_marks.pattern]), re.MULTILINE)
        self.start = Place(0, self._reasoning.get(thinking, ""))
        """Of every turn."""

    def begins_at(self, text: str, after: Place) -> Place:
        """The first position at which a call's markup begins or, at the end of the text, may begin; else the text's end.

        Without the white space before it, which belongs to the markup. Markup in reasoning is none.

        Args:
            text: the turn so far.
            after: nothing begins before it; for example what this gave when the text was shorter.
        """
        if not self._marks and not self._line_starts:
            return Place(len(text), "")
        position, closing = after
        while True:
            if closing:
                end = first_of(text, closing, position)
                if not text.startswith(closing, end):
                    return Place(end, closing)
                position, closing = end + len(closing), ""
            mark = self._mark(text, position)
            opened = min((first_of(text, tag, position), tag) for tag in self._reasoning) if self._reasoning else (mark, "")
            if opened[0] >= mark or not text.startswith(opened[1], opened[0]):
                return Place(position + len(text[position : min(opened[0], mark)].rstrip()), "")
            position, closing = opened[0] + len(opened[1]), self._reasoning[opened[1]]

    def _mark(self, text: str, start: int) -> int:
        end = min((first_of(text, mark, start) for mark in self._marks), default=len(text))
        line = self._line_marks.search(text, start)
        return end if line is None else min(end, line.start(1))

    def before_call(self, text: str, raw: str) -> str:
        """What a turn says before the markup of its calls, the first of which is ``raw``."""
        whole = self._thinking + text
        begin = max(0, speech_span(whole, self._all_marks, self._reasoning)[0] - len(self._thinking))
        end = min((place for mark in self._marks if (place := text.find(mark, begin)) >= 0), default=len(text))
        line = self._line_marks.search(text, begin)
        start = -1 if line is None else text.find(raw, line.start(1))
        if line is None or not 0 <= start < end:
            return text[:end].rstrip()
        said = text[:start].rstrip()
        for mark in self._line_starts:  # the bracket around a list of calls is no part of the first one
            said = said.removesuffix(mark).rstrip()
        return max(said, text[: line.start(1)].rstrip(), key=len)
