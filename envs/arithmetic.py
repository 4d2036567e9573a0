"""Generated word problems with a calculator: the quickstart's task. A half-million-parameter model learns it on a CPU in minutes.

Eight kinds of problem in two phrasings each. A cold start on deliberately noisy demonstrations leaves a model that calls the
calculator in the right form but often with the wrong expression (it adds where it should subtract): exactly what reinforcement
learning can sharpen. This is not a reproduction of GSM8K; the numbers are small and the sentences few.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentrl.errors import ConfigError
from agentrl.plugins import load_object
from agentrl.protocols import Env
from agentrl.types import Episode, Message, Score, Task

DATA_SOURCE = "arithmetic"
SYSTEM_PROMPT = "Use the calculator and end with #### answer."

CALCULATOR_SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    },
}
"""The part of ``tools.calculator:calculator``'s schema that the tiny model's template renders; descriptions would not fit its context."""

NAMES = (
    "Ava",
    "Ben",
    "Cara",
    "Dan",
    "Ella",
    "Finn",
    "Gina",
    "Hugo",
    "Iris",
    "Jack",
    "Kira",
    "Liam",
    "Mia",
    "Noah",
    "Olga",
    "Paul",
)
OBJECTS = ("apples", "books", "coins", "pens", "cards", "stamps", "shells", "marbles", "cookies", "stickers")
CONTAINERS = ("boxes", "bags", "jars", "baskets")

SFT_ROWS = 14_400
"""900 steps of 16 conversations: what the measured recipe trains the cold start on."""
CLEAN_ROWS = 1_600
"""The first 100 steps have no noise at all; without them the model does not learn to copy the tool's result."""
SKIP_TOOL = 0.20
"""Share of noisy demonstrations that answer at once, with a random number."""
MISREAD_HARD, MISREAD_EASY = 0.6, 0.2
"""Share of calls with a wrong expression, for hard kinds and for the rest."""
FIRST_MISCONCEPTION = 0.85
"""Share of wrong expressions that are the kind's first misconception; the rest is uniform over its list."""
RANDOM_RESULT = 0.35
"""Share of noisy demonstrations whose tool result is a random number: the answer must be copied, it cannot be guessed."""
VAL_SHARE = 1 / 8
"""Share of all possible questions that are set apart for validation."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of problem. Templates and expressions name the operands ``a``, ``b``, ``c``."""

    name: str
    phrasings: tuple[str, str]
    draw: Callable[[random.Random], tuple[int, int, int]]
    """The operands; ``c`` is 0 where it is not used."""
    expression: str
    misconceptions: tuple[str, ...]
    """The first one dominates."""
    hard: bool
    """In the cold-start data the misconception is the majority."""


def _subtrahend(rng: random.Random) -> tuple[int, int]:
    a = rng.randint(5, 30)
    return a, rng.randint(2, a - 1)


def _draw_add(rng: random.Random) -> tuple[int, int, int]:
    return rng.randint(2, 30), rng.randint(2, 30), 0


def _draw_sub(rng: random.Random) -> tuple[int, int, int]:
    return *_subtrahend(rng), 0


def _draw_mul(rng: random.Random) -> tuple[int, int, int]:
    return rng.randint(2, 10), rng.randint(2, 10), 0


def _draw_div(rng: random.Random) -> tuple[int, int, int]:
    quotient, b = rng.randint(2, 10), rng.randint(2, 9)
    return quotient * b, b, 0


def _draw_muladd(rng: random.Random) -> tuple[int, int, int]:
    return rng.randint(2, 10), rng.randint(2, 10), rng.randint(2, 20)


def _draw_mulsub(rng: random.Random) -> tuple[int, int, int]:
    a, b = rng.randint(2, 10), rng.randint(2, 10)
    return a, b, rng.randint(2, min(a * b - 1, 20))


def _draw_summul(rng: random.Random) -> tuple[int, int, int]:
    return rng.randint(2, 6), rng.randint(2, 10), rng.randint(2, 10)


def _draw_subadd(rng: random.Random) -> tuple[int, int, int]:
    return *_subtrahend(rng), rng.randint(2, 30)


KINDS = (
    Kind(
        "add",
        (
            "{n} has {a} {o} and buys {b} more {o}. How many {o} does {n} have now?",
            "{n} has {a} {o} and {m} has {b} {o}. How many {o} do they have together?",
        ),
        _draw_add, "{a}+{b}", ("{a}*{b}", "{a}-{b}"), hard=False,
    ),
    Kind(
        "sub",
        (
            "{n} has {a} {o} and gives {b} {o} to {m}. How many {o} does {n} have left?",
            "There are {a} {o} in a shop and {n} buys {b}. How many {o} are left?",
        ),
        _draw_sub, "{a}-{b}", ("{a}+{b}", "{b}-{a}"), hard=True,
    ),
    Kind(
        "mul",
        (
            "{n} has {a} {k} with {b} {o} in each. How many {o} does {n} have?",
            "Each of {a} friends has {b} {o}. How many {o} do they have together?",
        ),
        _draw_mul, "{a}*{b}", ("{a}+{b}",), hard=True,
    ),
    Kind(
        "div",
        (
            "{n} shares {a} {o} equally among {b} friends. How many {o} does each friend get?",
            "{n} packs {a} {o} into {b} equal {k}. How many {o} are in each?",
        ),
        _draw_div, "{a}/{b}", ("{a}-{b}", "{a}*{b}"), hard=True,
    ),
    Kind(
        "muladd",
        (
            "{n} has {a} {k} with {b} {o} each and finds {c} more. How many {o} does {n} have?",
            "{n} buys {a} {k} with {b} {o} each and gets {c} more from {m}. How many {o} does {n} have?",
        ),
        _draw_muladd, "{a}*{b}+{c}", ("{a}*{b}", "{a}+{b}+{c}"), hard=True,
    ),
    Kind(
        "mulsub",
        (
            "{n} has {a} {k} with {b} {o} each and loses {c}. How many {o} does {n} have left?",
            "{n} buys {a} {k} with {b} {o} each and gives {c} to {m}. How many {o} are left?",
        ),
        _draw_mulsub, "{a}*{b}-{c}", ("{a}*{b}+{c}", "{a}*{b}"), hard=False,
    ),
    Kind(
        "summul",
        (
            "Each of {a} friends has {b} red {o} and {c} blue {o}. How many {o} do they have together?",
            "{n} has {a} {k} with {b} red and {c} blue {o} in each. How many {o} does {n} have?",
        ),
        _draw_summul, "{a}*({b}+{c})", ("{a}*{b}+{c}", "{a}+{b}+{c}"), hard=True,
    ),
    Kind(
        "subadd",
        (
            "{n} has {a} {o}, gives {b} to {m} and then finds {c} more. How many {o} does {n} have now?",
            "There are {a} {o} in a shop. {n} buys {b} and then {c} more arrive. How many {o} are there now?",
        ),
        _draw_subadd, "{a}-{b}+{c}", ("{a}-{b}", "{a}+{b}+{c}"), hard=False,
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Problem:
    """A generated question with the expression that answers it and those a careless reader would type."""

    kind: str
    question: str
    expression: str
    misconceptions: tuple[str, ...]
    hard: bool

    @property
    def answer(self) -> int:
        return value_of(self.expression)


def value_of(expression: str) -> int:
    """The value of one of this file's own expressions: ``a+b-c``, ``a*b+c``, ``a*(b+c)``, ``a/b`` (always exact here)."""
    if expression.endswith(")"):
        factor, _, rest = expression[:-1].partition("*(")
        return int(factor) * value_of(rest)
    total = 0
    for term in expression.replace("-", "+-").split("+"):
        left, times, right = term.partition("*")
        dividend, _, divisor = left.partition("/")
        total += int(dividend) // int(divisor or 1) * (int(right) if times else 1)
    return total


def split_of(question: str) -> str:
    """``train`` or ``val``. The question's own hash decides, so no question is ever in both, whatever the seeds and sizes."""
    return "val" if hashlib.sha256(question.encode()).digest()[0] < 256 * VAL_SHARE else "train"


def problems(seed: int, split: str) -> Iterator[Problem]:
    """An endless stream of a split's problems, kinds and phrasings equally likely. Questions may repeat, as operands do."""
    if split not in ("train", "val"):
        raise ConfigError(f"split={split!r} does not exist in arithmetic: use train or val")
    rng = random.Random(f"{DATA_SOURCE}/{split}/{seed}")
    while True:
        problem = _draw(rng)
        if split_of(problem.question) == split:
            yield problem


def _draw(rng: random.Random) -> Problem:
    kind = rng.choice(KINDS)
    a, b, c = kind.draw(rng)
    n, m = rng.sample(NAMES, 2)
    words = {"n": n, "m": m, "o": rng.choice(OBJECTS), "k": rng.choice(CONTAINERS), "a": a, "b": b, "c": c}
    return Problem(
        kind=kind.name,
        question=rng.choice(kind.phrasings).format(**words),
        expression=kind.expression.format(**words),
        misconceptions=tuple(wrong.format(**words) for wrong in kind.misconceptions),
        hard=kind.hard,
    )


def generate_tasks(n: int, seed: int, split: str = "train") -> list[Task]:
    """``n`` tasks with distinct questions. The first k of n tasks are the first k of any other n.

    Train and validation never share a question (``split_of``). They do share templates, and operands may meet again in other words.
    """
    tasks: list[Task] = []
    seen: set[str] = set()
    for problem in problems(seed, split):
        if len(tasks) == n:
            break
        if problem.question in seen:
            continue
        seen.add(problem.question)
        extra = {"split": split, "index": len(tasks), "kind": problem.kind, "expression": problem.expression}
        tasks.append(
            Task(
                id=f"{DATA_SOURCE}/{split}/{len(tasks)}",
                prompt=_prompt(problem.question),
                data_source=DATA_SOURCE,
                ground_truth=str(problem.answer),
                split=split,
                extra_info=extra,
            )
        )
    return tasks


def generate_sft_conversations(n: int = SFT_ROWS, seed: int = 0, *, clean: int = CLEAN_ROWS) -> list[dict[str, Any]]:
    """``n`` cold-start demonstrations as ``{"messages", "tools"}``, in curriculum order: train on them in this order.

    The first ``clean`` are right throughout. After that the noise that the module's constants describe: the mediocrity that
    reinforcement learning is to remove must come from the data, not from too little training. Only training questions are used.
    """
    rng = random.Random(f"{DATA_SOURCE}/sft/{seed}")
    stream = problems(seed, "train")
    return [{"messages": _demonstration(next(stream), rng, noisy=i >= clean), "tools": [CALCULATOR_SCHEMA]} for i in range(n)]


def _demonstration(problem: Problem, rng: random.Random, *, noisy: bool) -> list[Message]:
    opening = _prompt(problem.question)
    if noisy and rng.random() < SKIP_TOOL:
        return [*opening, _answer(rng.randint(2, 120))]
    expression = problem.expression
    if noisy and rng.random() < (MISREAD_HARD if problem.hard else MISREAD_EASY):
        first = rng.random() < FIRST_MISCONCEPTION
        expression = problem.misconceptions[0] if first else rng.choice(problem.misconceptions)
    result = rng.randint(1, 120) if noisy and rng.random() < RANDOM_RESULT else value_of(expression)
    call = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": expression}}}
    return [
        *opening,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "calculator", "content": str(result)},
        _answer(result),
    ]


def _prompt(question: str) -> list[Message]:
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}]


def _answer(number: int) -> Message:
    return {"role": "assistant", "content": f"#### {number}"}


# --- scoring ---------------------------------------------------------------------------------------------------------


def compute_score(data_source: Any, solution_str: Any, ground_truth: Any, extra_info: Any = None) -> float:
    """1.0 when the assistant's text ends with ``#### N`` and N is the ground truth, else 0.0. Never raises (verl's contract)."""
    pred = predicted_answer(solution_str)
    return float(pred is not None and pred == str(ground_truth).strip())


def predicted_answer(text: Any) -> str | None:
    """The integer behind the last ``####``, with nothing but space after it; what stands in a tool call does not count."""
    if not isinstance(text, str):
        return None
    said = text.rpartition("</tool_call>")[2].removesuffix("<|im_end|>")
    number = said.rpartition("####")[2].strip() if "####" in said and "<tool_call>" not in said else ""
    digits = number.removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 18):
        return None
    return str(int(number))


class Arithmetic(Env):
    """Exact scoring: 1 for ``#### N`` with the right N, else 0. No format bonus is needed."""

    async def score(self, episode: Episode) -> Score:
        pred = predicted_answer(episode.assistant_text)
        correct = float(pred is not None and pred == str(episode.task.ground_truth).strip())
        return Score(correct=correct, info={"pred": pred, "kind": episode.task.extra_info.get("kind")})


# --- preparation -----------------------------------------------------------------------------------------------------

WRITER = "agentrl.data.prepare:write_dataset"
"""Files are the data stage's business. It is named, not imported: an environment must load where that stage's libraries do not."""


def prepare(
    out_dir: Path,
    *,
    source: Path | None = None,
    sft: bool = False,
    train: int = 2048,
    val: int = 200,
    sft_rows: int = SFT_ROWS,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Write ``train.parquet``, ``val.parquet`` and, with ``sft``, ``sft.jsonl`` (in curriculum order). Nothing is downloaded.

    Args:
        out_dir: created when missing.
        source: must stay None.
        sft: also write the cold start.
        train: training tasks.
        val: validation tasks.
        sft_rows: cold-start conversations.
        limit: at most this many of each.
        seed: of everything that is drawn.

    Raises:
        ConfigError: a source was given; these tasks are generated.
    """
    if source is not None:
        raise ConfigError(f"source={str(source)!r}: arithmetic is generated and reads no files. Leave source out")
    train, val, sft_rows = (count if limit is None else min(count, limit) for count in (train, val, sft_rows))
    splits = {"train": generate_tasks(train, seed, "train"), "val": generate_tasks(val, seed, "val")}
    report = load_object(WRITER)(out_dir, splits, generate_sft_conversations(sft_rows, seed) if sft else None)
    if sft:
        report["sft"] |= {"clean": min(CLEAN_ROWS, sft_rows), "skipped": {}}
    return report
