"""Where the markup of calls begins in a turn, also in one that is still being sampled."""

import re

from agentrl.rollout.tool_parsers import ToolParser

_END_OF_REASONING = "</think>"


def first_of(text: str, mark: str, start: int) -> int:
    """Where ``mark`` stands in ``text`` from ``start`` on, or the end of the text begins it, so that it may yet come; else its length."""
    found = text.find(mark, start)
    if found >= 0:
        return found
    for length in range(min(len(mark) - 1, len(text) - start), 0, -1):
        if text.endswith(mark[:length]):
            return len(text) - length
    return len(text)


def _after_reasoning(text: str, start: int) -> int:
    thought = text.rfind(_END_OF_REASONING, start)
    return start if thought < 0 else thought + len(_END_OF_REASONING)


class Openings:
    """Of one format.

    Args:
        parser: of the format; None where no calls are looked for.
    """

    def __init__(self, parser: ToolParser | None) -> None:
        self._marks = parser.openers if parser is not None else ()
        self._line_starts = parser.line_openers if parser is not None else ()
        lines = "|".join(map(re.escape, self._line_starts))
        self._line_marks = re.compile(rf"^[ \t]*({lines})", re.MULTILINE) if lines else None

    def begins_at(self, text: str, start: int = 0) -> int:
        """The first position at which a call's markup begins or, at the end of the text, may begin; else the text's length.

        Without the white space before it, which belongs to the markup. Markup in reasoning is none.

        Args:
            start: nothing begins before it.
        """
        if not self._marks and self._line_marks is None:
            return len(text)
        begin = _after_reasoning(text, start)
        end = min((first_of(text, mark, begin) for mark in self._marks), default=len(text))
        line = self._line_marks.search(text, begin) if self._line_marks is not None else None
        if line is not None:
            end = min(end, line.start(1))
        return max(start, len(text[:end].rstrip()))

    def before_call(self, text: str, raw: str) -> str:
        """What a whole turn says before the markup of its calls, the first of which is ``raw``."""
        begin = _after_reasoning(text, 0)
        places = [text.find(mark, begin) for mark in (*self._marks, raw)]
        said = text[: min((place for place in places if place >= 0), default=len(text))].rstrip()
        for mark in self._line_starts:  # the bracket around a list of calls is no part of the first one
            said = said.removesuffix(mark).rstrip()
        return said
