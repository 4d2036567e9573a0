"""One rollout on a terminal: its turns, its tokens coloured by who wrote them, its tool calls and timings."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from agentrl.assembly.by_hand import HandRollout
from agentrl.telemetry.trajectory_log import to_record
from agentrl.types import Segment, Turn

SAMPLED, OBSERVED = "green", "dim"


def as_json(played: HandRollout) -> dict[str, Any]:
    """The trajectory's record (as ``trajectories/`` holds it) with its calls, its transcript and what went wrong."""
    calls = [
        {"name": c.name, "arguments": dict(c.arguments), "ok": c.ok, "error_kind": c.error_kind, "result": c.result}
        for c in played.episode.calls
    ]
    return {
        **to_record(played.trajectory, played.episode),
        "calls": calls,
        "transcript": played.episode.transcript,
        "scored": played.is_scored,
        "error": played.error,
    }


def show(console: Console, played: HandRollout, *, trace: bool) -> None:
    """Print it; ``trace`` adds one line per token."""
    t = played.trajectory
    for index, segment in enumerate(t.segments):
        if len(t.segments) > 1:
            console.rule(f"segment {index}", style="dim")
        console.print(coloured(played.tokenizer, segment), soft_wrap=True)
    console.rule(style="dim")
    console.print(turn_table(t.turns))
    if trace:
        for index, segment in enumerate(t.segments):
            console.print(token_table(played.tokenizer, segment, title=f"segment {index}"))
    reward = f"{t.reward:g} {dict(t.reward_terms)}" if played.is_scored else "not scored"
    console.print(
        f"stop {t.stop} · reward {reward} · {t.num_sampled} of {t.num_tokens} tokens sampled · {t.finished - t.created:.2f} s",
        highlight=False, markup=False,
    )  # fmt: skip
    if played.error:
        console.print(f"failed: {played.error}", style="red", highlight=False, markup=False)


def coloured(tokenizer: Any, segment: Segment) -> Text:
    """The segment's text: green was sampled by the policy, dim was shown to it."""
    text = Text()
    for sampled, ids in runs(segment.ids.tolist(), segment.mask.tolist()):
        text.append(tokenizer.decode(ids, skip_special_tokens=False), style=SAMPLED if sampled else OBSERVED)
    return text


def runs(ids: Sequence[int], mask: Sequence[bool]) -> Iterator[tuple[bool, list[int]]]:
    """Consecutive tokens with the same mask."""
    start = 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or mask[i] != mask[start]:
            yield bool(mask[start]), list(ids[start:i])
            start = i


def turn_table(turns: Sequence[Turn]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("turn", "tokens", "ms", "what"):
        table.add_column(column, justify="right" if column in ("tokens", "ms") else "left")
    for turn in turns:
        if turn.kind == "model":
            what = f"{turn.finish or 'stop'}, {turn.server}"
        else:
            outcome = "ok" if turn.ok else turn.error_kind
            what = f"{turn.name or 'no tool'}({turn.arguments}) {outcome}: {_one_line(turn.text)}" if turn.kind == "tool" else (
                f"{turn.name}: {_one_line(turn.text)}"
            )  # fmt: skip
        table.add_row(turn.kind, str(turn.end - turn.start), f"{turn.ms:.0f}", Text(what))
    return table


def token_table(tokenizer: Any, segment: Segment, *, title: str) -> Table:
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    for column in ("at", "id", "token", "sampled", "logprob", "version"):
        table.add_column(column, justify="left" if column == "token" else "right")
    for at, (i, sampled, logprob, version) in enumerate(
        zip(segment.ids.tolist(), segment.mask.tolist(), segment.logprobs.tolist(), segment.versions.tolist(), strict=True)
    ):
        token = Text(repr(tokenizer.decode([i], skip_special_tokens=False)), style=SAMPLED if sampled else OBSERVED)
        shown = (f"{logprob:.4f}", str(version)) if sampled else ("", "")
        table.add_row(str(at), str(i), token, "x" if sampled else "", *shown)
    return table


def _one_line(text: str, limit: int = 100) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"
