"""The shortcuts around the tokenizer give what the tokenizer gives."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from agentrl.rollout.token_text import TokenText
from agentrl.testing.tiny_model import make_tiny_tokenizer

TOKENIZER = make_tiny_tokenizer()
TEXT = TokenText(TOKENIZER)
ODD = st.lists(
    st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(["<|im_end|>", "<tool_call>", "  ", "\n\n", "é", "🧮"])
).map("".join)


def slowly(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def test_both_shortcuts_are_taken_for_a_byte_level_tokenizer() -> None:
    assert TEXT._encodes_fast  # pyright: ignore[reportPrivateUsage]
    assert TEXT._bytes is not None  # pyright: ignore[reportPrivateUsage]


@settings(max_examples=300)
@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=40))
def test_any_ids_decode_as_the_tokenizer_decodes_them_broken_utf8_included(ids: list[int]) -> None:
    assert TEXT.decode(ids) == slowly(TOKENIZER, ids)


@given(st.binary(max_size=24))
def test_any_bytes_decode_as_the_tokenizer_decodes_them(data: bytes) -> None:
    table = TEXT._bytes  # pyright: ignore[reportPrivateUsage]
    assert table is not None
    single = {token: i for i, token in enumerate(table) if len(token) == 1}
    ids = [single[data[i : i + 1]] for i in range(len(data))]
    assert TEXT.decode(ids) == slowly(TOKENIZER, ids)


@settings(max_examples=200)
@given(ODD)
def test_any_text_encodes_as_the_tokenizer_encodes_it(text: str) -> None:
    assert TEXT.encode(text) == list(TOKENIZER.encode(text, add_special_tokens=False))


def test_ids_outside_the_vocabulary_go_to_the_tokenizer() -> None:
    assert TEXT.decode([5, len(TOKENIZER) + 7]) == slowly(TOKENIZER, [5, len(TOKENIZER) + 7])
    assert TEXT.decode([]) == ""


def test_truncation_left_on_by_others_does_not_cut_text() -> None:
    tokenizer = make_tiny_tokenizer()
    text = TokenText(tokenizer)
    long = "many marbles " * 50
    whole = text.encode(long)
    tokenizer(long, truncation=True, max_length=4)
    assert text.encode(long) == whole
    assert len(whole) > 50


@pytest.mark.parametrize("decoder", [decoders.WordPiece(), decoders.Metaspace()])
def test_other_decoders_keep_the_tokenizers_own_way(decoder: Any) -> None:
    words = ["[UNK]", "a", "##b", "▁c", "d"]
    inner: Any = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Whitespace(), decoder
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")
    text = TokenText(tokenizer)
    assert text._bytes is None  # pyright: ignore[reportPrivateUsage]
    assert text.decode([1, 2, 3, 4]) == slowly(tokenizer, [1, 2, 3, 4])
    assert text.encode("a d a") == [1, 4, 1]
