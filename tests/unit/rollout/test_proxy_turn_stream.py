"""What of a turn may be shown while it is sampled: never a character that has to be taken back, and in the end all of it."""

import random
from collections.abc import Sequence
from typing import Any

import pytest

from agentrl.rollout.chat_template import ChatTemplate
from agentrl.rollout.proxy.turn_reader import Said, TurnReader
from agentrl.rollout.proxy.turn_stream import Delta, TurnStream
from agentrl.rollout.token_text import GrowingText, TokenText
from agentrl.rollout.tool_parsers import get_tool_parser, tool_parsers
from agentrl.rollout.tool_parsers.openings import Openings, first_of
from agentrl.testing.tiny_model import make_tiny_tokenizer
from agentrl.types import Generation, SampledTokens, ToolCall

TOKENIZER = make_tiny_tokenizer()
TEMPLATE = ChatTemplate(TOKENIZER, tools=None)
CALLS = {
    "deepseek": '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "glm": "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>",
    "gpt_oss": '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}<|call|>',
    "hermes": '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>',
    "llama3_json": '{"name": "add", "parameters": {"a": 1}}',
    "mistral": '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}]',
    "pythonic": "[add(a=1)]",
    "qwen3_coder": "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
}


def written(call: ToolCall) -> dict[str, Any]:
    return {"name": call.name, "arguments": dict(call.arguments)}


def played(
    text: str, *, stops: Sequence[str] = (), parser: str | None = None, sizes: Sequence[int] = (1,), ends: bool = True
) -> tuple[TurnStream, list[Delta], Generation]:
    """A turn of this text, told in chunks of these sizes, over and over."""
    ids = [*TOKENIZER.encode(text, add_special_tokens=False), *([TOKENIZER.eos_token_id] if ends else ())]
    generation = Generation(
        ids=ids,
        logprobs=[-float(n) for n in range(len(ids))],
        versions=[n // 5 for n in range(len(ids))],
        finish="stop",
        server="s",
    )
    deltas: list[Delta] = []
    reader = TurnReader(None if parser is None else get_tool_parser(parser), stops=stops)
    stream = TurnStream(TEMPLATE, reader=reader, write=written, show=deltas.append)
    start = turn = 0
    while start < len(ids):
        part = slice(start, start + sizes[turn % len(sizes)])
        stream.take(SampledTokens(ids[part], generation.logprobs[part], generation.versions[part], "s"))
        start, turn = part.stop, turn + 1
    return stream, deltas, generation


def text_of(deltas: Sequence[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


@pytest.mark.parametrize("sizes", [(1,), (3,), (1, 7, 2), (1000,)])
def test_multi_byte_characters_come_whole_and_every_token_once(sizes: Sequence[int]) -> None:
    said = "Grüße 🧮 漢字 é\u0301 ok?  two  spaces\n"
    stream, deltas, generation = played(said, sizes=sizes)
    assert all("\ufffd" not in delta.text for delta in deltas)
    assert text_of(deltas) == said
    if sizes == (1,):
        assert len([delta for delta in deltas if delta.text]) > 5
    stream.end(Said(said, ()), generation)
    assert stream.shown == said
    assert [i for delta in deltas for i in delta.ids] == generation.ids
    assert [x for delta in deltas for x in delta.logprobs] == generation.logprobs
    broken_off = stream.so_far()
    assert broken_off is not None
    assert (broken_off.ids, broken_off.versions, broken_off.finish) == (generation.ids, generation.versions, "abort")


def test_bytes_that_are_no_character_are_shown_as_the_whole_turn_shows_them() -> None:
    broken = [next(i for i in range(len(TOKENIZER)) if TokenText(TOKENIZER).bytes_of([i]) == bytes([0xF0]))] * 2
    deltas: list[Delta] = []
    stream = TurnStream(TEMPLATE, reader=TurnReader(None), write=written, show=deltas.append)
    stream.take(SampledTokens([*broken, *TOKENIZER.encode("a")], [-1.0] * 3, [0] * 3, "s"))
    assert text_of(deltas) == TEMPLATE.decode([*broken, *TOKENIZER.encode("a")]) == "\ufffd\ufffda"


def test_a_turn_that_is_all_tokens_of_ends_shows_nothing() -> None:
    _, deltas, _ = played("")
    assert [delta.text for delta in deltas] == [""]


@pytest.mark.parametrize("stop", ["END", " the", "\n\n", "🧮"])
def test_text_before_a_stop_string_is_shown_and_no_part_of_one_that_may_come(stop: str) -> None:
    for said in (f"one E EN two {stop} three {stop}", f"one{stop[:-1]}, all the EN", "nothing"):
        _, deltas, _ = played(said, stops=[stop, "never"])
        whole = said.partition(stop)[0]
        shown = text_of(deltas)
        assert whole.startswith(shown)
        held = whole[len(shown) :] + said[len(whole) :]
        assert not held or held.startswith(stop) or any(m.startswith(held) for m in (stop, "never")), (said, shown)


@pytest.mark.parametrize("name", sorted(tool_parsers()))
def test_no_markup_of_a_call_is_shown_in_any_format(name: str) -> None:
    parser, call = get_tool_parser(name), CALLS[name]
    (found,) = parser.find_calls(call)
    for said in ("", "I will add.\n", "x < y, a [b] {c}: to add\n\n"):
        for sizes in ((1,), (4,)):
            _, deltas, _ = played(said + call, parser=name, sizes=sizes)
            shown = text_of(deltas)
            assert said.startswith(shown), shown
            assert Openings(parser).before_call(said + call, found.raw) == said.rstrip()
    _, deltas, _ = played("A sentence that calls nothing. ", parser=name)
    assert text_of(deltas) == "A sentence that calls nothing."


def test_a_call_that_was_only_thought_about_holds_nothing_up() -> None:
    said = f"<think>\nI could {CALLS['hermes']}\n</think>\nNo: it is 7"
    stream, deltas, generation = played(said, parser="hermes")
    assert text_of(deltas) == said
    stream.end(Said(said, ()), generation)
    assert stream.shown == said


def test_what_cannot_be_taken_back_is_kept() -> None:
    stream, deltas, generation = played("shown", ends=False)
    stream.end(Said("other", ()), generation)
    assert text_of(deltas) == stream.shown == "shown"


BLOCKS = sorted(set(CALLS) - {"gpt_oss", "mistral", "pythonic"})
"""Formats in which a call has an end that a turn goes on behind."""


@pytest.mark.parametrize("name", BLOCKS)
def test_a_call_is_shown_when_its_block_has_closed_and_one_that_may_be_malformed_is_not(name: str) -> None:
    call = {"name": "add", "arguments": {"a": 1 if "1}" in CALLS[name] else "1"}}
    more = CALLS[name].removeprefix("<｜tool▁calls▁begin｜>").removesuffix("<｜tool▁calls▁end｜>")
    whole = CALLS[name].removesuffix("<｜tool▁calls▁end｜>")
    stream, deltas, _ = played(f"I add.\n{whole}", parser=name, ends=False)
    assert (text_of(deltas), stream.calls) == ("I add.", [call])
    assert [len(delta.calls) for delta in deltas] == [0] * (len(deltas) - 1) + [1]
    assert len(played(f"{whole}\n{more}", parser=name, ends=False)[0].calls) == 2
    assert played(whole[:-1], parser=name, ends=False)[0].calls == []
    assert played(f"{whole.replace('add', '')}\n{more}", parser=name, ends=False)[0].calls == []
    assert played(f"STOP {whole}", parser=name, stops=["STOP"], ends=False)[0].calls == []
    stream, deltas, generation = played(f"{whole}\n{more} and so on", parser=name)
    stream.end(TurnReader(get_tool_parser(name)).read(f"{whole}\n{more} and so on", is_cut=False), generation)
    assert [call for delta in deltas for call in delta.calls] == stream.calls


@pytest.mark.parametrize(("text", "mark", "place"), [("abc", "bc", 1), ("abc", "cd", 2), ("abc", "x", 3), ("aab", "abx", 1)])
def test_a_mark_begins_where_it_stands_or_may_come(text: str, mark: str, place: int) -> None:
    assert first_of(text, mark, 0) == place


class Sentences:
    """A tokenizer whose decoder does more than join bytes: words, with a space between them, and none before the first."""

    words = ("Hello", "world", "é", ",", "again")
    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return " ".join(self.words[i] for i in ids).replace(" ,", ",")


def test_decoders_that_look_around_give_the_same_text_piece_by_piece() -> None:
    rng, text = random.Random(0), TokenText(Sentences())
    for _ in range(50):
        ids = rng.choices(range(5), k=12)
        growing = GrowingText(text)
        assert "".join(growing.add([i]) for i in ids) == Sentences().decode(ids)
