"""One turn as the agent sees it: what it says, and the calls in it; also of a turn that is still being sampled."""

from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

from agentrl.rollout.tool_parsers import FoundCall, ToolParser
from agentrl.rollout.tool_parsers.openings import Openings
from agentrl.types import ToolCall


class Said(NamedTuple):
    """A turn that was read."""

    content: str
    """What stands before its calls; all of it where it has none."""
    calls: Sequence[ToolCall]


class TurnReader:
    """Reads turns for one request.

    Args:
        parser: of the calls' format; None where no calls are looked for.
        thinking: what the prompt opened on the model's behalf.
        stops: stop strings.
        max_calls: calls behind these are left out; None keeps all.
    """

    def __init__(
        self, parser: ToolParser | None, *, thinking: str = "", stops: Sequence[str] = (), max_calls: int | None = None
    ) -> None:
        self.stops, self.openings = stops, Openings(parser, thinking=thinking)
        self.closers: Sequence[str] = () if parser is None else getattr(parser, "closers", ())
        """Strings with which a call ends in this format. None, and calls are known when the turn is over."""
        self._parser, self._thinking, self._max_calls = parser, thinking, max_calls

    def read(self, text: str, *, is_cut: bool) -> Said:
        """A whole turn. Calls without fault are calls, whatever stands behind them; malformed ones are text.

        Args:
            text: the turn.
            is_cut: it ended at a token limit.
        """
        calls = [call for call in self._found(text, is_cut=is_cut) if isinstance(call, ToolCall)][: self._max_calls]
        if calls:
            return Said(self.openings.before_call(text, calls[0].raw), calls)
        for stop in self.stops:
            text = text.partition(stop)[0]
        return Said(text, ())

    def read_closed(self, text: str) -> Said | None:
        """What of a turn that begins like this is certain: its calls up to the first that may be malformed; None without one.

        Args:
            text: the turn, up to the end of one of ``closers``.
        """
        sound = takewhile(lambda found: isinstance(found, ToolCall), self._found(text, is_cut=True))
        calls = [call for call in sound if isinstance(call, ToolCall)][: self._max_calls]
        return Said(self.openings.before_call(text, calls[0].raw), calls) if calls else None

    def _found(self, text: str, *, is_cut: bool) -> list[FoundCall]:
        return [] if self._parser is None else self._parser.find_calls(self._thinking + text, is_cut=is_cut)
