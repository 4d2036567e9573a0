"""One turn while it is sampled: what of its text may be shown already, and what was sampled so far.

Shown is only what stays as it is whatever comes next: whole characters; nothing from where a stop string, or a call where
tools are offered, begins or may begin; a call, whole, when its block has closed, unless one before it may be malformed. The
rest follows when the turn is over and was read as a whole, so that all that was shown is the same answer unstreamed.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from agentrl.rollout.chat_template import ChatTemplate
from agentrl.rollout.proxy.turn_reader import Said, TurnReader
from agentrl.rollout.tool_parsers.openings import first_of
from agentrl.types import Generation, SampledTokens, ToolCall

_MAX_LOOKS = 256
"""For closed calls in one turn: each reads the turn from its beginning, and the end of a call may be any brace."""


class Delta(NamedTuple):
    """What an answer grows by."""

    text: str
    """May be empty: tokens came, and what they say has to wait."""
    ids: Sequence[int]
    """The tokens whose text is shown by now and that were in no delta before."""
    logprobs: Sequence[float]
    calls: Sequence[dict[str, Any]] = ()
    """Whole calls in OpenAI's form, behind all of the text."""


class TurnStream:
    """See the module's docstring.

    Args:
        template: of the turn.
        reader: of the request.
        write: a call in OpenAI's form; asked once for each call that is shown.
        show: takes the deltas; it returns at once.
    """

    def __init__(
        self,
        template: ChatTemplate,
        *,
        reader: TurnReader,
        write: Callable[[ToolCall], dict[str, Any]],
        show: Callable[[Delta], None],
    ) -> None:
        self._stop_ids = frozenset(template.stop_ids)
        self._reader, self._write, self._show = reader, write, show
        self._growing = template.growing_text()
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._versions: list[int] = []
        self._server = ""
        self._text = ""
        self._ends: list[int] = []
        """Per token that was decoded, the length of the text with it. Stop tokens at the end are not decoded: they may be the turn's."""
        self._held_from = reader.openings.start
        self._num_shown = 0
        """Characters of the text."""
        self._num_tokens_shown = 0
        self._searched_to = self._num_looks = 0
        self.shown = ""
        """The text that was shown."""
        self.calls: list[dict[str, Any]] = []
        """The calls that were shown."""

    def so_far(self) -> Generation | None:
        """What was sampled, as a generation that was broken off; None before the first token."""
        if not self._ids:
            return None
        return Generation(
            ids=list(self._ids),
            logprobs=list(self._logprobs),
            versions=list(self._versions),
            finish="abort",
            server=self._server,
        )

    def take(self, tokens: SampledTokens) -> None:
        """Tokens were sampled."""
        self._ids += tokens.ids
        self._logprobs += tokens.logprobs
        self._versions += tokens.versions
        self._server = tokens.server
        end = len(self._ids)
        while end > len(self._ends) and self._ids[end - 1] in self._stop_ids:
            end -= 1
        for token in self._ids[len(self._ends) : end]:
            self._text += self._growing.add([token])
            self._ends.append(len(self._text))
        text = "" if self.calls else self._certain_text()
        first = self._num_tokens_shown
        while self._num_tokens_shown < len(self._ends) and self._ends[self._num_tokens_shown] <= self._num_shown:
            self._num_tokens_shown += 1
        last = self._num_tokens_shown
        self.shown += text
        self._show(Delta(text, self._ids[first:last], self._logprobs[first:last]))
        closed = self._closed_calls()
        if closed is not None and len(closed.calls) > len(self.calls):
            left, calls = self._left_of(closed)
            self._show(Delta(left, (), (), calls))

    def end(self, said: Said, generation: Generation) -> None:
        """The turn is over: show what is left of it, and the tokens."""
        left, calls = self._left_of(said)
        first = self._num_tokens_shown
        self._show(Delta(left, generation.ids[first:], generation.logprobs[first:], calls))

    def _left_of(self, said: Said) -> tuple[str, Sequence[dict[str, Any]]]:
        """What was not shown yet, and now is."""
        # Where decoding piece by piece gave other characters than decoding the whole (some SentencePiece decoders do), what
        # was shown cannot be taken back.
        left = said.content[len(self.shown) :] if not self.calls and said.content.startswith(self.shown) else ""
        calls = [self._write(call) for call in said.calls[len(self.calls) :]]
        self.shown += left
        self.calls += calls
        return left, calls

    def _certain_text(self) -> str:
        start = self._num_shown
        self._held_from = self._reader.openings.begins_at(self._text, self._held_from)
        self._num_shown = min([self._held_from.position, *(first_of(self._text, stop, start) for stop in self._reader.stops)])
        return self._text[start : self._num_shown]

    def _closed_calls(self) -> Said | None:
        """The calls up to the last block that closed, where one closed since the last look."""
        start, end = self._searched_to, self._end_of_turn()
        self._searched_to = end
        closed = 0
        for closer in self._reader.closers:
            place = self._text.rfind(closer, max(start - len(closer) + 1, self._held_from.position), end)
            closed = max(closed, place + len(closer) if place >= 0 else 0)
        if not closed or self._num_looks == _MAX_LOOKS:
            return None
        self._num_looks += 1
        return self._reader.read_closed(self._text[:closed])

    def _end_of_turn(self) -> int:
        """Where a stop string ends the turn: the end of the token that completes it; else the text's end."""
        places = [(self._text.find(stop, self._num_shown), len(stop)) for stop in self._reader.stops]
        stopped = [place + length for place, length in places if place >= 0]
        if not stopped:
            return len(self._text)
        return next((end for end in self._ends if end >= min(stopped)), len(self._text))
