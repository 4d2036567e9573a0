"""Tokens passed on while they arrive: each once, in order, and only when nothing can take it back any more.

A token can be taken back while its policy label is not verified: the update that was to bring the label may fail, or the
engine may serve unknown weights (`AsyncLLMServerManager`, I5). Such tokens wait until their label is verified or the request
is over. What one server passed on is kept when it dies, so the next server's tokens simply follow.
"""

from collections.abc import Collection
from dataclasses import dataclass

from agentrl.errors import GenerationError
from agentrl.protocols import TokenListener
from agentrl.serving.sglang_client import PartialGeneration
from agentrl.types import SampledTokens


@dataclass(slots=True)
class TokenRelay:
    """Of one ``generate`` call, over all the servers it visits."""

    listener: TokenListener
    num_told: int = 0

    def arrived(self, piece: PartialGeneration, *, num_before: int, server: str, certain: Collection[str] | None) -> None:
        """Tokens were added to ``piece``.

        Args:
            piece: what one server sent so far.
            num_before: the call's tokens from earlier servers.
            server: its url.
            certain: labels that cannot be taken back; None where labels are not checked.
        """
        start, end = self.num_told - num_before, len(piece)
        if certain is not None:
            end = next((i for i in range(start, end) if piece.labels[i] not in certain), end)
        self._tell(piece, start, end, server)

    def settled(self, so_far: PartialGeneration, *, server: str) -> None:
        """A server is done; what it sent and what was kept of it is in ``so_far``.

        Raises:
            GenerationError: what was told was taken back after all, because the server changed a label at the end.
        """
        if len(so_far) < self.num_told:
            raise GenerationError(
                f"{server} labelled tokens anew when it finished, so that {self.num_told - len(so_far)} tokens that were passed "
                "on already are of unknown weights. Look at that engine's log"
            )
        self._tell(so_far, self.num_told, len(so_far), server)

    def _tell(self, piece: PartialGeneration, start: int, end: int, server: str) -> None:
        if start >= end:
            return
        self.num_told += end - start
        self.listener(SampledTokens(piece.ids[start:end], piece.logprobs[start:end], piece.versions_of(start, end), server))
