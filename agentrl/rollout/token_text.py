"""Text to ids and back, exactly as the tokenizer does it, at a fraction of its price.

A Hugging Face tokenizer spends most of a turn's time around the real work: it looks at every id in Python, tracks character
offsets nobody asked for, and allocates a string per token. Two shortcuts, each taken only where probes at construction
give what the tokenizer itself gives, and left for good otherwise:

- ``encode`` calls the Rust tokenizer without offsets;
- ``decode`` joins the bytes of the tokens, which is all that a byte-level decoder does. (``tokenizers`` 0.2x,
  ``decoders.ByteLevel``: each token's characters mapped to bytes, or its own UTF-8 where one is not in the map; joined; invalid
  UTF-8 replaced.)
"""

import codecs
import random
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PROBES = (
    "", " ", "a", " leading and trailing ", "two\n\nlines\ttab\r\n", "é ﷽ 🧮 \u200d 漢字 ¡", "<think>\n{\"a\": [1, 2.5]}</think>",
    "123456789 0.5 -7", "<|im_start|>user\nhi<|im_end|>\n<tool_call>{}</tool_call>", "\u0301combining e\u0301", "don't DON'T  x",
)  # fmt: skip
_NUM_RANDOM_PROBES = 64


class TokenText:
    """Encode and decode for one tokenizer, without special tokens added or skipped.

    Args:
        tokenizer: a Hugging Face tokenizer. Its vocabulary must not change any more.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._bytes: NDArray[np.object_] | None = None
        self._encodes_fast = False
        if self._backend is None:
            return
        self._encodes_fast = hasattr(self._backend, "encode_batch_fast") and self._agrees_on_text()
        table = _byte_table(self._backend, tokenizer)
        if table is not None and self._agrees_on_ids(table):
            self._bytes = np.array(table, dtype=np.object_)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; control tokens written in it become control tokens."""
        # Whoever called the tokenizer with truncation or padding left that switched on in the Rust object.
        if self._encodes_fast and self._backend.truncation is None and self._backend.padding is None:
            ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
            return ids
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, control tokens included."""
        joined = self.bytes_of(ids)
        return self._slowly(ids) if joined is None else joined.decode("utf-8", "replace")

    def bytes_of(self, ids: Sequence[int]) -> bytes | None:
        """The bytes of ``ids``; None where the decoder does more than join bytes, or the vocabulary lacks an id."""
        if self._bytes is None:
            return None
        try:
            pieces: list[bytes] = self._bytes[np.array(array("I", ids), np.uint32)].tolist()
        except (IndexError, OverflowError):
            return None
        return b"".join(pieces)

    def _slowly(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _agrees_on_text(self) -> bool:
        encode: Callable[[str], list[int]] = lambda text: list(self._tokenizer.encode(text, add_special_tokens=False))  # noqa: E731
        slow = [encode(text) for text in _PROBES]
        return slow == [self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids for text in _PROBES]

    def _agrees_on_ids(self, table: list[bytes]) -> bool:
        rng = random.Random(0)
        probes = [rng.choices(range(len(table)), k=24) for _ in range(_NUM_RANDOM_PROBES)]
        return all(b"".join(table[i] for i in ids).decode("utf-8", "replace") == self._slowly(ids) for ids in probes)


class GrowingText:
    """The text of ids that come one after the other: every character once, when no further id can change it."""

    def __init__(self, text: TokenText) -> None:
        self._text = text
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []
        self._joins_bytes = True
        self._shown_from = self._shown_to = 0
        """The text of ``ids[shown_from:shown_to]`` was given, and is decoded again as the context of what follows."""

    def add(self, ids: Sequence[int]) -> str:
        """The characters that these ids completed."""
        self._ids += ids
        joined = self._text.bytes_of(ids) if self._joins_bytes else None
        if joined is not None:
            self._shown_from = self._shown_to = len(self._ids)
            return self._decoder.decode(joined)
        self._joins_bytes = False
        before = self._text.decode(self._ids[self._shown_from : self._shown_to])
        now = self._text.decode(self._ids[self._shown_from :])
        if not now.startswith(before) or now.endswith("\ufffd"):
            return ""
        self._shown_from, self._shown_to = self._shown_to, len(self._ids)
        return now[len(before) :]


def _byte_table(backend: Any, tokenizer: Any) -> list[bytes] | None:
    """The bytes of every id, where the decoder only joins bytes and ids have no gaps."""
    if type(backend.decoder).__name__ != "ByteLevel":
        return None
    table: list[bytes] = []
    for i in range(len(tokenizer)):
        token: str | None = backend.id_to_token(i)
        if token is None:
            return None
        mapped = [_BYTE_OF.get(character, -1) for character in token]
        table.append(token.encode() if -1 in mapped else bytes(mapped))
    return table


def _byte_characters() -> dict[str, int]:
    """GPT-2's map: printable bytes stand for themselves, the others for characters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_characters()
