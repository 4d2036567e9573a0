"""One turn while it is sampled: what of its text may be shown already, and what was sampled so far.

Shown is only what stays as it is whatever comes next: whole characters; nothing from where a stop string, or a call where
tools are offered, begins or may begin. The rest follows when the turn is over and was read as a whole, so that all that was
shown is the content of the same answer unstreamed.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from agentrl.rollout.chat_template import ChatTemplate
from agentrl.rollout.tool_parsers.openings import Openings, first_of
from agentrl.types import Generation, SampledTokens


class Delta(NamedTuple):
    """What an answer grows by."""

    text: str
    """May be empty: tokens came, and what they say has to wait."""
    ids: Sequence[int]
    """The tokens whose text is shown by now and that were in no delta before."""
    logprobs: Sequence[float]


class TurnStream:
    """See the module's docstring.

    Args:
        template: of the turn.
        stops: stop strings.
        openings: of the calls' format.
        show: takes the deltas; it returns at once.
    """

    def __init__(
        self, template: ChatTemplate, *, stops: Sequence[str], openings: Openings, show: Callable[[Delta], None]
    ) -> None:
        self._stop_ids = frozenset(template.stop_ids)
        self._stops, self._openings, self._show = stops, openings, show
        self._growing = template.growing_text()
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._versions: list[int] = []
        self._server = ""
        self._text = ""
        self._ends: list[int] = []
        """Per token that was decoded, the length of the text with it. Stop tokens at the end are not decoded: they may be the turn's."""
        self._num_shown = 0
        """Characters of the text."""
        self._num_tokens_shown = 0

    @property
    def shown(self) -> str:
        """The text that was shown."""
        return self._text[: self._num_shown]

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
        start = self._num_shown
        self._num_shown = self._certain_end()
        first = self._num_tokens_shown
        while self._num_tokens_shown < len(self._ends) and self._ends[self._num_tokens_shown] <= self._num_shown:
            self._num_tokens_shown += 1
        last = self._num_tokens_shown
        self._show(Delta(self._text[start : self._num_shown], self._ids[first:last], self._logprobs[first:last]))

    def end(self, content: str, generation: Generation) -> str:
        """The turn is over: show what is left of its content, and the tokens. Returns the content as it was shown."""
        # Where decoding piece by piece gave other characters than decoding the whole (some SentencePiece decoders do), what
        # was shown cannot be taken back.
        shown = self.shown
        left = content[len(shown) :] if content.startswith(shown) else ""
        first = self._num_tokens_shown
        self._show(Delta(left, generation.ids[first:], generation.logprobs[first:]))
        return shown + left

    def _certain_end(self) -> int:
        start = self._num_shown
        ends = [first_of(self._text, stop, start) for stop in self._stops]
        return min([*ends, self._openings.begins_at(self._text, start)])
