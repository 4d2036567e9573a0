"""DeepSeek's calls, between ``<｜tool▁calls▁begin｜>`` and ``<｜tool▁calls▁end｜>``.

V3 and R1 write ``<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME``, a fenced JSON object and ``<｜tool▁call▁end｜>``; V3.1 writes
``<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{…}<｜tool▁call▁end｜>``. Both are read.
"""

import re

from agentrl.rollout.tool_parsers import FoundCall, tool_parser
from agentrl.rollout.tool_parsers.reading import CUT, DECODER, MAX_CALLS, call_from, explain_json, failed, skip_space, spoken

BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, SEPARATOR, END_CALL = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
EXAMPLE = f"{BEGIN}{CALL}tool{SEPARATOR}{{…}}{END_CALL}{END}"
FENCED_EXAMPLE = f"{BEGIN}{CALL}function{SEPARATOR}tool\n```json\n{{…}}\n```{END_CALL}{END}"
_FENCED = re.compile(r"\s*([^\s`{]{0,256})[ \t]*\n\s*```(?:json)?[ \t]*\n?")
_CALLS = re.compile(f"{BEGIN}|{CALL}|{SEPARATOR}")
_FENCE_END = re.compile(r"\s*```\s*")


@tool_parser("deepseek")
class DeepSeekParser:
    """See the module's docstring."""

    name = "deepseek"
    markers: tuple[str, ...] = (CALL, SEPARATOR)
    openers: tuple[str, ...] = (BEGIN, CALL)
    line_openers: tuple[str, ...] = ()
    closers: tuple[str, ...] = (END_CALL,)

    def find_calls(self, text: str, *, is_cut: bool = False) -> list[FoundCall]:
        """The calls of one turn."""
        text = spoken(text, _CALLS)
        _, begin, inside = text.partition(BEGIN)
        if not begin:
            stray = min((p for p in (text.find(CALL), text.find(SEPARATOR)) if p >= 0), default=-1)
            return [] if stray < 0 else [failed(f"{BEGIN} is missing before the calls. Write {EXAMPLE}", text[stray:])]
        inside, end, after = inside.partition(END)
        is_cut = is_cut and not end
        found: list[FoundCall] = []
        position = skip_space(inside, 0)
        while len(found) < MAX_CALLS and position < len(inside):
            if inside.startswith(CALL, position):
                call, position = self._read(inside, position + len(CALL), is_cut=is_cut)
                position = skip_space(inside, position)
            else:
                again = inside.find(CALL, position)
                again = len(inside) if again < 0 else again
                stray_text = inside[position:again]
                reason = (
                    CUT if is_cut and again == len(inside) else f"found {stray_text[:40]!r} where {CALL} belongs. Write {EXAMPLE}"
                )
                call, position = failed(reason, stray_text), again
            found.append(call)
        if not found:
            found.append(failed(CUT if is_cut else f"no call follows {BEGIN}. Write {EXAMPLE}", inside))
        if CALL in after and len(found) < MAX_CALLS:
            found.append(failed(f"a call follows {END}; write all calls before it. Write {EXAMPLE}", after))
        return found

    def _read(self, text: str, start: int, *, is_cut: bool) -> tuple[FoundCall, int]:
        """One call whose body begins at ``start``; also returns where to go on."""
        close, again = text.find(END_CALL, start), text.find(CALL, start)
        stop = min((p for p in (close, again) if p >= 0), default=len(text))
        after = stop + len(END_CALL) if stop == close else stop
        body = text[start:stop]
        is_cut = is_cut and stop == len(text)
        head, separator, rest = body.partition(SEPARATOR)
        if not separator:
            return failed(CUT if is_cut else f"{SEPARATOR} is missing. Write {EXAMPLE}", body), after
        fenced = _FENCED.match(rest) if head.strip() == "function" else None
        name, source = (fenced.group(1), rest[fenced.end() :]) if fenced else (head.strip(), rest)
        example = FENCED_EXAMPLE if fenced or head.strip() == "function" else EXAMPLE
        if not name:
            return failed(CUT if is_cut else f"the call has no name. Write {example}", body), after
        try:
            value, end = DECODER.raw_decode(source, skip_space(source, 0))
        except (ValueError, RecursionError) as error:
            shown = source.strip()
            reason = explain_json(shown, error, example=example, is_closed=stop < len(text), is_cut=is_cut, closing=END_CALL)
            return failed(reason, body), after
        fence = _FENCE_END.match(source, end) if fenced else None
        rest_at = fence.end() if fence else skip_space(source, end)
        is_cut_in_end = is_cut and any(mark.startswith(source[rest_at:]) for mark in ("```", END_CALL))
        if rest_at < len(source) and not is_cut_in_end:
            reason = f"extra text after the arguments: {source[rest_at : rest_at + 60]!r}. Write {example}"
            return failed(reason, body), after
        if not isinstance(value, dict):
            return failed(f"the arguments must be an object. Write {example}", body), after
        return call_from(name, value, raw=body.strip(), example=example), after
