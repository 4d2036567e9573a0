"""Cut text to a number of tokens, with a note in place of what is missing."""

from typing import Any

from agentrl.plugins import Truncate

_CHARS_PER_TOKEN = 16
"""Generous: text longer than this per allowed token is first cut by characters, so that a tool that prints megabytes does
not hold up the event loop. Counts in the note are then estimates."""


def cut_to_tokens(tokenizer: Any, text: str, limit: int, side: Truncate = "middle") -> str:
    """``text`` within about ``limit`` tokens, the note included.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        text: any text.
        limit: tokens, at least 1.
        side: what is cut away: ``left`` keeps the tail, ``right`` keeps the head, ``middle`` keeps both ends.
    """
    if len(text) <= limit:  # no token is shorter than a character, but for bytes of one character
        spans = _spans(tokenizer, text) if not text.isascii() else None
        if spans is None or len(spans) <= limit:
            return text
    window = max(64, limit) * _CHARS_PER_TOKEN
    is_huge = len(text) > 4 * window
    head, tail = (text[:window], text[-window:]) if is_huge else (text, text)
    head_spans = _spans(tokenizer, head)
    tail_spans = _spans(tokenizer, tail) if is_huge else head_spans
    num_tokens = len(head_spans)
    if is_huge:
        num_tokens = max(limit + 1, round(len(text) * (len(head_spans) + len(tail_spans)) / (2 * window)))
    if num_tokens <= limit:
        return text
    note = f"\n[… {'about ' if is_huge else ''}{num_tokens - limit} tokens cut …]\n"
    keep = limit - len(_spans(tokenizer, note))
    if keep <= 0:  # no room for a note
        note, keep = "", limit
    num_head = {"middle": (keep + 1) // 2, "right": keep, "left": 0}[side]
    num_tail = keep - num_head
    kept_head = head[: head_spans[min(num_head, len(head_spans)) - 1][1]] if num_head and head_spans else ""
    kept_tail = tail[tail_spans[max(0, len(tail_spans) - num_tail)][0] :] if num_tail and tail_spans else ""
    return kept_head + note + kept_tail


def _spans(tokenizer: Any, text: str) -> list[tuple[int, int]]:
    """Character span of each token."""
    if not text:
        return []
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return [(int(a), int(b)) for a, b in encoded["offset_mapping"]]
