"""Bounded capture and hostile directories."""

import asyncio
import os
import socket
from pathlib import Path

import pytest

from agentrl.sandbox.fetch import fetch_files
from agentrl.sandbox.output import CappedOutput


async def capture(chunks: list[bytes], *, keep: int, limit: int = 1 << 20) -> tuple[str, bool, int]:
    reader, writer = os.pipe()
    hits: list[int] = []
    output = CappedOutput(reader, keep_bytes=keep, limit_bytes=limit, on_limit=lambda: hits.append(1))
    for chunk in chunks:
        await asyncio.to_thread(os.write, writer, chunk)
    os.close(writer)
    await output.ended()
    return output.text(), output.truncated, len(hits)


@pytest.mark.asyncio
async def test_short_output_is_kept_whole() -> None:
    assert await capture([b"ab", b"", b"cd"], keep=8) == ("abcd", False, 0)
    assert await capture([], keep=8) == ("", False, 0)
    assert await capture([b"12345678"], keep=8) == ("12345678", False, 0)


@pytest.mark.asyncio
async def test_long_output_keeps_three_quarters_of_head_and_a_quarter_of_tail() -> None:
    text, truncated, _ = await capture([b"123456", b"7890", b"xyz"], keep=8)
    assert truncated
    assert text == "123456\n... [5 bytes omitted] ...\nyz"


@pytest.mark.asyncio
async def test_the_limit_is_reported_once_and_the_writer_is_never_blocked() -> None:
    text, truncated, hits = await capture([b"x" * 50_000] * 20, keep=1000, limit=100_000)
    assert (truncated, hits) == (True, 1)
    assert "[999000 bytes omitted]" in text


@pytest.mark.asyncio
async def test_a_character_cut_in_two_by_reads_is_whole_and_invalid_bytes_are_replaced() -> None:
    assert (await capture(["ž".encode()[:1], "ž".encode()[1:], b"\xff"], keep=100))[0] == "ž\ufffd"


def test_only_regular_files_below_the_directory_are_returned(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("outside")
    work = tmp_path / "work"
    (work / "sub").mkdir(parents=True)
    (work / "a").write_bytes(b"a\0")
    (work / "sub" / "b").write_bytes(b"")
    (work / "link").symlink_to("../secret")
    (work / "inner").symlink_to("a")
    (work / "dir").symlink_to("..")
    (work / "big").write_bytes(b"x" * 11)
    os.mkfifo(work / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(work / "sock"))
    fd = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
    try:
        wanted = [
            "a",
            "sub/b",
            "link",
            "inner",
            "dir/secret",
            "../secret",
            str(tmp_path / "secret"),
            "fifo",
            "sub",
            "none",
            "sock",
        ]
        found, errors = fetch_files(fd, [*wanted, "big"], max_file_bytes=10, max_total_bytes=100)
        limited, over = fetch_files(fd, ["a", "big"], max_file_bytes=20, max_total_bytes=12)
    finally:
        os.close(fd)
    assert found == {"a": b"a\0", "sub/b": b""}
    assert set(errors) == set(wanted[2:]) | {"big"}
    assert errors["link"] == errors["inner"] == errors["dir/secret"] == "refused: a symbolic link is in the path"
    assert errors["../secret"] == "refused: it leaves the working directory"
    assert errors["fifo"] == errors["sub"] == "refused: not a regular file"
    assert (limited, list(over)) == ({"a": b"a\0"}, ["big"])
