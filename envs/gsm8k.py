"""GSM8K with an honest calculator: prompts, scoring, and preparation of the files that training reads.

Scoring reads only what the assistant wrote. ``strict`` is the number behind the last ``####``; ``lenient`` also takes a
``\\boxed{}``, an "answer is", or the last number. Both go through one normaliser and are compared exactly, as fractions.
"""

import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypedDict

from agentrl.errors import ConfigError, DataError, ToolError
from agentrl.plugins import load_object
from agentrl.protocols import Env
from agentrl.types import Episode, Message, Score, Task

DATA_SOURCE = "openai/gsm8k"
HUB_FILES = {"train": "main/train-00000-of-00001.parquet", "test": "main/test-00000-of-00001.parquet"}

Method: TypeAlias = Literal["strict", "lenient"]

PROMPTS = {
    "full": (
        "Solve the problem step by step. Use the calculator tool for every calculation instead of working it out in your head. "
        "Finish with one line that holds only the final number: #### <answer>"
    ),
    "short": "Use the calculator and end with #### answer.",
}
"""System texts. ``short`` is for models that are too small to follow instructions and learn the form from a cold start."""

CALCULATOR_SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": (
            "Work out an arithmetic expression exactly. Results that are not finite decimals are rounded to 12 significant digits."
        ),
        "parameters": {
            "type": "object",
            "properties": {
                "expression": {
                    "type": "string",
                    "description": "Numbers with + - * / // % ** and parentheses, for example (3 + 4) * 5 / 2",
                }
            },
            "required": ["expression"],
        },
    },
}
"""What ``tools.calculator:calculator`` looks like to the model; stored with every cold-start conversation."""

MAX_NUMBER_LENGTH = 100
"""Characters of a number; a longer one is not an answer, and converting it would take quadratic time."""


# --- scoring ---------------------------------------------------------------------------------------------------------

_MARKER = "####"
_NUMBER = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)(?:[ \t]*+/[ \t]*+[0-9]+)?"
_DECORATION = r"(?:[\s$£€*_`~\\({\[\"'=:]|boxed|text)*+"
_SIGN = r"[-+−–]"
# The number must not be the beginning of something longer: 6*7, 6*(7), 1, 2, 10:30, 1 042, 4.2.1, 4e1, 3x5.
_GOES_ON = (
    r"(?:[ \t]*+(?:[-+/×÷^,:−–]|\*{1,2})?[ \t]*+[0-9]|[ \t]*+[-+/×÷^*−–][ \t]*+\("
    r"|\.[0-9]|[eE][-+]?[0-9]|[ \t]*+[xX][ \t]*+[0-9]|[0-9])"
)
_ANSWER = re.compile(rf"{_DECORATION}(?P<sign>{_SIGN})?{_DECORATION}(?P<number>{_NUMBER})(?!{_GOES_ON})")
_ANSWER_IS = re.compile(r"answer\s*(?:is|:|=)", re.IGNORECASE)
_ANY_NUMBER = re.compile(rf"(?P<sign>(?<![\w)\].%]){_SIGN}[$£€]?)?(?P<number>{_NUMBER})")
_TOOL_BLOCKS = (("<tool_call>", "</tool_call>"), ("<tool_response>", "</tool_response>"))


class ScoreDetails(TypedDict):
    """``score`` is 1.0 or 0.0 by the chosen method; ``pred`` is the canonical number that method read, or None."""

    score: float
    strict: int
    lenient: int
    pred: str | None


def compute_score(
    data_source: Any, solution_str: Any, ground_truth: Any, extra_info: Any = None, *, method: Method = "strict"
) -> float:
    """1.0 when the answer equals the ground truth, else 0.0 (verl's contract). Never raises; linear in the text's length.

    Args:
        data_source: not used; there for the contract.
        solution_str: assistant text. What stands inside ``<tool_call>`` or ``<tool_response>`` blocks does not count.
        ground_truth: a number, as text (``1,042``, ``#### 1042``, a whole GSM8K answer) or int, float, Fraction.
        extra_info: not used; there for the contract.
        method: ``strict`` wants ``####``, ``lenient`` also accepts what a person would.
    """
    return score_details(data_source, solution_str, ground_truth, extra_info, method=method)["score"]


def score_details(
    data_source: Any, solution_str: Any, ground_truth: Any, extra_info: Any = None, *, method: Method = "strict"
) -> ScoreDetails:
    """The same, with both verdicts and the prediction."""
    gold = _gold(ground_truth)
    text = _outside_tool_blocks(solution_str) if isinstance(solution_str, str) else ""
    strict = _strict_answer(text)
    lenient = strict if strict is not None else _lenient_answer(text)
    pred = strict if method == "strict" else lenient
    return ScoreDetails(
        score=float(gold is not None and pred == gold),
        strict=int(gold is not None and strict == gold),
        lenient=int(gold is not None and lenient == gold),
        pred=None if pred is None else _canonical(pred),
    )


def parse_number(text: str) -> Fraction | None:
    """The number a text begins with, decoration aside: ``42.``, ``$1,042``, ``**42**``, ``−3``, ``42%``, ``1/2``, ``42 dollars``."""
    return _number_at(text, 0)


def _gold(ground_truth: Any) -> Fraction | None:
    if isinstance(ground_truth, str):
        return _strict_answer(ground_truth) if _MARKER in ground_truth else parse_number(ground_truth)
    try:
        return Fraction(ground_truth)
    except (TypeError, ValueError, OverflowError):
        return None


def _outside_tool_blocks(text: str) -> str:
    """The text without its tool blocks; a block that never closes takes the rest with it, as the model was cut off inside."""
    for opening, closing in _TOOL_BLOCKS:
        kept: list[str] = []
        at = 0
        while (start := text.find(opening, at)) >= 0:
            kept.append(text[at:start])
            end = text.find(closing, start)
            at = len(text) if end < 0 else end + len(closing)
        kept.append(text[at:])
        text = "\n".join(kept)
    return text


def _strict_answer(text: str) -> Fraction | None:
    text = text.rstrip("# \t\r\n")  # a marker with nothing behind it closes a heading or was cut off
    at = text.rfind(_MARKER)
    return None if at < 0 else _number_at(text, at + len(_MARKER))


def _lenient_answer(text: str) -> Fraction | None:
    """``\\boxed{}``, else "answer is", else the last number."""
    if (at := text.rfind("\\boxed")) >= 0 and (boxed := _number_at(text, at + len("\\boxed"))) is not None:
        return boxed
    stated = _last(_ANSWER_IS, text)
    if stated is not None and (answer := _number_at(text, stated.end())) is not None:
        return answer
    last = _last(_ANY_NUMBER, text)
    return None if last is None else _fraction(last)


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)


def _number_at(text: str, at: int) -> Fraction | None:
    match = _ANSWER.match(text, at)
    return None if match is None else _fraction(match)


def _fraction(match: re.Match[str]) -> Fraction | None:
    number = match["number"]
    if len(number) > MAX_NUMBER_LENGTH:
        return None
    numerator, _, denominator = number.replace(",", "").partition("/")
    value = Fraction(Decimal(numerator.strip()))
    if denominator:
        if int(denominator) == 0:
            return None
        value /= int(denominator)
    return -value if (match["sign"] or "+")[0] in "-−–" else value


def _canonical(value: Fraction) -> str:
    """One spelling per number, so that votes can be counted: ``42``, ``42.5``, ``1/3``."""
    if value.denominator == 1 or 10**12 % value.denominator:
        return str(value)
    return f"{Decimal(value.numerator) / Decimal(value.denominator):f}"


class Gsm8k(Env):
    """Exact scoring of GSM8K answers, with both verdicts in the record.

    Args:
        method: which verdict is the reward.
        tool_success: added once, as the term of that name, when at least one call parsed and executed. 0 leaves it out.
    """

    def __init__(self, *, method: Method = "strict", tool_success: float = 0.0) -> None:
        if method not in ("strict", "lenient"):
            raise ConfigError(f"method={method!r} is not a scoring method: use strict or lenient")
        self.method: Method = method
        self.tool_success = tool_success

    async def score(self, episode: Episode) -> Score:
        details = score_details(
            episode.task.data_source,
            episode.assistant_text,
            episode.task.ground_truth,
            episode.task.extra_info,
            method=self.method,
        )
        terms: dict[str, float] = {}
        if self.tool_success:
            terms["tool_success"] = self.tool_success * any(call.ok for call in episode.calls)
        return Score(correct=details["score"], terms=terms, info={key: details[key] for key in ("strict", "lenient", "pred")})


# --- preparation -----------------------------------------------------------------------------------------------------

# Files are the data stage's business. It is named, not imported: an environment must load where that stage's libraries do not.
READER, WRITER = "agentrl.data.rows:raw_rows", "agentrl.data.prepare:write_dataset"
_MARK = re.compile(r"<<([^<>=]+)=([^<>]+)>>")


def prepare(
    out_dir: Path,
    *,
    source: Path | None = None,
    sft: bool = False,
    prompt: Literal["full", "short"] = "full",
    limit: int | None = None,
    seed: int = 0,
    max_calls: int = 6,
    calculate: Callable[[str], str] | None = None,
) -> dict[str, Any]:
    """Write ``train.parquet`` and ``test.parquet`` in verl's schema and, with ``sft``, ``sft.jsonl``: a cold start.

    The cold start turns the data set's own ``<<expression=result>>`` marks into calculator calls. Every tool result is what the
    calculator really answers; a mark that states something else stays plain text and is counted.

    Args:
        out_dir: created when missing.
        source: a directory with ``train.jsonl`` and ``test.jsonl`` of ``{question, answer}``; None downloads the data set.
        sft: also write the cold start.
        prompt: which system text the rows carry.
        limit: at most this many rows per split.
        seed: not used, nothing is drawn; there because every ``prepare`` takes it.
        max_calls: leave conversations with more calls out of the cold start.
        calculate: expression -> result text, raising ``ToolError``; None is the shipped calculator.

    Raises:
        DataError: the source is missing or malformed, or the download is impossible.
    """
    write_dataset = load_object(WRITER)
    rows = {split: list(_read_split(split, source, limit)) for split in HUB_FILES}
    tasks = {split: [_task(split, i, row, prompt) for i, row in enumerate(found)] for split, found in rows.items()}
    if not sft:
        return write_dataset(out_dir, tasks)
    counts: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    conversations = list(
        _conversations(rows["train"], PROMPTS[prompt], calculate or _shipped_calculator(), max_calls, counts, skipped)
    )
    report = write_dataset(out_dir, tasks, conversations)
    report["sft"] |= {**counts, "skipped": dict(skipped)}
    return report


def _task(split: str, index: int, row: Mapping[str, str], prompt: str) -> Task:
    return Task(
        id=f"{DATA_SOURCE}/{split}/{index}",
        prompt=_prompt(PROMPTS[prompt], row["question"]),
        data_source=DATA_SOURCE,
        ground_truth=row["answer"].rpartition(_MARKER)[2].strip().replace(",", ""),
        split=split,
        extra_info={"split": split, "index": index, "question": row["question"], "answer": row["answer"]},
    )


def _prompt(system: str, question: str) -> list[Message]:
    return [{"role": "system", "content": system}, {"role": "user", "content": question}]


def _read_split(split: str, source: Path | None, limit: int | None) -> Iterator[dict[str, str]]:
    raw_rows = load_object(READER)
    path = _download(split) if source is None else Path(source) / f"{split}.jsonl"
    for number, row in raw_rows(path):
        if limit is not None and number >= limit:
            return
        for column in ("question", "answer"):
            if not isinstance(row.get(column), str):
                raise DataError(f"{path}: row {number}: column {column!r} is {type(row.get(column)).__name__}, expected text")
        if _MARKER not in row["answer"] or _strict_answer(row["answer"]) is None:
            raise DataError(f"{path}: row {number}: column 'answer' does not end with '#### <number>'")
        yield {"question": row["question"], "answer": row["answer"]}


def _download(split: str) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(DATA_SOURCE, HUB_FILES[split], repo_type="dataset"))
    except (OSError, ValueError) as error:  # the hub's own errors derive from these
        raise DataError(
            f"could not download {DATA_SOURCE} ({HUB_FILES[split]}): {str(error).splitlines()[0] if str(error) else type(error).__name__}. "
            "Without a network, pass source= a directory with train.jsonl and test.jsonl"
        ) from error


def _shipped_calculator() -> Callable[[str], str]:
    evaluate = load_object("tools.calculator:evaluate")
    format_number = load_object("tools.calculator:format_number")
    return lambda expression: format_number(evaluate(expression))


def _conversations(
    rows: list[dict[str, str]],
    system: str,
    calculate: Callable[[str], str],
    max_calls: int,
    counts: Counter[str],
    skipped: Counter[str],
) -> Iterator[dict[str, Any]]:
    counts.update({"calls": 0, "marks": 0, "marks_left_as_text": 0})
    for row in rows:
        messages = _demonstration(row["answer"], calculate, counts)
        calls = sum(message["role"] == "tool" for message in messages)
        written = "\n".join(message["content"] for message in messages if message["role"] == "assistant")
        if calls == 0:
            skipped["no_usable_mark"] += 1
        elif calls > max_calls:
            skipped["too_many_calls"] += 1
        elif compute_score(DATA_SOURCE, written, row["answer"]) != 1.0:
            skipped["does_not_score"] += 1
        else:
            counts["calls"] += calls
            yield {"messages": [*_prompt(system, row["question"]), *messages], "tools": [CALCULATOR_SCHEMA]}


def _demonstration(answer: str, calculate: Callable[[str], str], counts: Counter[str]) -> list[Message]:
    """A GSM8K answer as turns: text up to a mark, the call, the calculator's result, and so on to ``#### N``."""
    messages: list[Message] = []
    text, at = "", 0
    for mark in _MARK.finditer(answer):
        counts["marks"] += 1
        text += answer[at : mark.start()]
        at = mark.end()
        expression, stated = mark[1].strip(), mark[2].strip()
        try:
            result = calculate(expression)
        except ToolError:
            result = None
        if result is None or parse_number(result) is None or parse_number(result) != parse_number(stated):
            counts["marks_left_as_text"] += 1
            continue
        said = text.rstrip()
        text = "$" if said.endswith("$") else ""  # "= $<<4/2=2>>2" continues with "$2"
        messages += [
            _call(said.removesuffix("$").rstrip(), expression),
            {"role": "tool", "name": "calculator", "content": result},
        ]
    return [*messages, {"role": "assistant", "content": (text + answer[at:]).strip()}]


def _call(text: str, expression: str) -> Message:
    function = {"name": "calculator", "arguments": {"expression": expression}}
    return {"role": "assistant", "content": text.lstrip(), "tool_calls": [{"type": "function", "function": function}]}
