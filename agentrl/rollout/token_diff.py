"""Where two token sequences differ, for people: positions, ids and the text of each token."""

import difflib
from collections.abc import Callable, Sequence

MAX_LINES = 14
_MAX_TOKENS = 40
"""Tokens shown of one difference."""


def show_difference(left: Sequence[int], right: Sequence[int], decode: Callable[[int], str], *, context: int = 6) -> str:
    """One line per run of tokens: ``-`` is in ``left`` (pieces) only, ``+`` in ``right`` (whole) only, ``@`` its position.

    Args:
        left: ids put together piece by piece.
        right: ids of one render of everything.
        decode: text of one token.
        context: tokens shown before and after a difference.
    """
    left, right = list(left), list(right)
    start = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    start = max(0, start - context)

    def named(ids: Sequence[int]) -> str:
        return " ".join(f"{i}:{decode(i)!r}" for i in ids)

    lines: list[str] = []
    matcher = difflib.SequenceMatcher(a=left[start:], b=right[start:], autojunk=False)  # equal heads cost it square time
    for tag, *span in matcher.get_opcodes():
        a, b, c, d = (start + position for position in span)
        if tag == "equal":
            if lines:
                lines.append(f"    @{a} {named(left[a : min(b, a + context)])}")
            elif b > a:
                lines.append(f"    @{max(a, b - context)} {named(left[max(a, b - context) : b])}")
            continue
        if b > a:
            lines.append(f"  - @{a} {named(left[a : min(b, a + _MAX_TOKENS)])}  (pieces, {b - a} tokens)")
        if d > c:
            lines.append(f"  + @{c} {named(right[c : min(d, c + _MAX_TOKENS)])}  (whole, {d - c} tokens)")
    return "\n".join(lines[:MAX_LINES])
