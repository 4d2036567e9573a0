"""Context management: a rollout whose context grew too long goes on in a new segment, from which old tool results are gone.

The new segment's prompt is made of ids, not of text: what the model sampled stays as it was sampled, and each dropped result
is replaced by the template's own rendering of a note. Prompts are never trained on, so every sampled token is trained once,
in the segment, and behind exactly the context, in which it was sampled.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

PolicyName: TypeAlias = Literal["drop_oldest_tool_results"]

NOTE = "[This result was removed to save space. Call again if it is needed.]"


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextPolicy:
    """When the context is rewritten, and how far."""

    at_tokens: int
    """Context length, the prompt included, above which the next generation sees a rewritten one."""
    to_tokens: int
    """Results are dropped, oldest first, until the context is no longer than this; then a while passes until the next rewrite."""
    keep: int = 1
    """The latest turns' results that are never dropped."""

    def __post_init__(self) -> None:
        if not 0 < self.to_tokens <= self.at_tokens or self.keep < 0:
            raise ValueError(
                f"at_tokens={self.at_tokens}, to_tokens={self.to_tokens}, keep={self.keep}: wanted are 0 < to_tokens <= at_tokens "
                "and keep >= 0"
            )


@dataclass(frozen=True, slots=True)
class ResultSpan:
    """The tool results of one turn within the current segment."""

    start: int
    end: int
    num_results: int
    is_dropped: bool = False


@dataclass(frozen=True, slots=True)
class Rewrite:
    """A shorter context."""

    ids: list[int]
    spans: list[ResultSpan]
    num_dropped: int
    """Results that are gone."""


def drop_oldest_results(
    ids: Sequence[int],
    spans: Sequence[ResultSpan],
    policy: ContextPolicy,
    note_ids: Callable[[int, int], Sequence[int]],
) -> Rewrite | None:
    """The context with its oldest results replaced by notes; None where it is short enough or nothing can be dropped.

    Args:
        ids: the current context.
        spans: its tool results, in order; not changed.
        note_ids: ids of that many notes behind the given id, as the template prints them.
    """
    if len(ids) <= policy.at_tokens:
        return None
    droppable = len(spans) - policy.keep
    out: list[int] = []
    moved: list[ResultSpan] = []
    length, position, num_dropped = len(ids), 0, 0
    for index, span in enumerate(spans):
        out.extend(ids[position : span.start])
        position = span.end
        body: Sequence[int] = ids[span.start : span.end]
        is_dropped = span.is_dropped
        if index < droppable and not is_dropped and length > policy.to_tokens:
            note = note_ids(span.num_results, ids[span.start - 1])
            if len(note) < len(body):
                length -= len(body) - len(note)
                num_dropped += span.num_results
                body, is_dropped = note, True
        moved.append(ResultSpan(len(out), len(out) + len(body), span.num_results, is_dropped))
        out.extend(body)
    out.extend(ids[position:])
    return Rewrite(out, moved, num_dropped) if num_dropped else None
