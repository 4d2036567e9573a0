"""Urls, errors and pauses: what needs no server."""

import asyncio
from pathlib import Path

import pytest
import redis

from agentrl.errors import ConfigError, StreamError
from agentrl.stream import keys as keys_module
from agentrl.stream import server
from agentrl.stream.connection import Pauses, classify, connect, connect_async, is_transient, redact_url, retry, retry_async
from agentrl.stream.keys import KEY_NAMES, Keys


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:s3cret@host:6379/0", "redis://***@host:6379/0"),
        ("rediss://:s3cret@host", "rediss://***@host"),
        ("unix:///run/a.sock?db=0&password=s3cret", "unix:///run/a.sock?db=0&password=***"),
        ("unix://me@/run/a.sock?Password=s3cret&db=1", "unix://***@/run/a.sock?Password=***&db=1"),
        ("redis://host:6379", "redis://host:6379"),
        ("redis://a:s3@cret@host", "redis://***@host"),
        ("redis+sentinel://:s3cret@a,b/m?sentinel_password=s3cret", "redis+sentinel://***@a,b/m?sentinel_password=***"),
    ],
)
def test_credentials_are_cut_from_urls(url: str, shown: str) -> None:
    assert redact_url(url) == shown


@pytest.mark.parametrize("opener", [connect, connect_async])
def test_unknown_url_kind_is_refused_without_showing_its_password(opener: object) -> None:
    with pytest.raises(ConfigError, match=r"redis://, rediss://, unix:// or redis\+sentinel://") as caught:
        opener("http://u:s3cret@host")  # pyright: ignore[reportCallIssue]
    assert "s3cret" not in str(caught.value)


def test_clients_never_retry_and_outwait_every_block() -> None:
    client = connect("redis://127.0.0.1:1", role="learn")
    options = client.connection_pool.connection_kwargs
    assert options["retry"]._retries == 0
    assert options["retry_on_error"] == []
    assert options["socket_timeout"] >= 10
    assert options["client_name"].startswith("agentrl-learn-")


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (redis.ConnectionError("gone"), True),
        (redis.TimeoutError("slow"), True),
        (ConnectionResetError(), True),
        (redis.exceptions.BusyLoadingError("LOADING"), True),
        (redis.ResponseError("READONLY You can't write"), True),
        (redis.ResponseError("Command # 1 (GET a) of pipeline caused error: TRYAGAIN later"), True),
        (redis.AuthenticationError("bad"), False),
        (redis.ResponseError("MISCONF disk"), False),
        (redis.ResponseError("WRONGTYPE"), False),
        (ValueError("x"), False),
    ],
)
def test_only_errors_that_waiting_cures_are_transient(error: Exception, transient: bool) -> None:
    assert is_transient(error) is transient


def test_errors_are_named_by_what_the_reader_can_do() -> None:
    assert isinstance(classify(redis.AuthenticationError("x"), "putting"), ConfigError)
    assert "disk" in str(classify(redis.ResponseError("MISCONF Errors writing"), "putting"))
    assert "lost its data" in str(classify(redis.ResponseError("NOGROUP No such key"), "reading"))


def test_retry_repeats_until_the_server_is_back() -> None:
    answers: list[Exception | int] = [redis.ConnectionError("a"), redis.TimeoutError("b"), 7]

    def call() -> int:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert retry(call, "testing", patience_s=None) == 7


def test_retry_gives_up_after_its_patience_and_says_how_long() -> None:
    def call() -> int:
        raise redis.ConnectionError("away")

    with pytest.raises(StreamError, match="testing: Redis was unreachable for 0.0 s"):
        retry(call, "testing", patience_s=0.0)


def test_wrong_password_is_not_waited_for() -> None:
    def call() -> int:
        raise redis.AuthenticationError("invalid username-password pair")

    with pytest.raises(ConfigError, match="credentials"):
        retry(call, "testing", patience_s=None)


@pytest.mark.asyncio
async def test_async_retry_reports_why_it_waits() -> None:
    waits: list[str] = []
    calls = 0

    async def call() -> int:
        nonlocal calls
        calls += 1
        if calls < 3:
            raise redis.ConnectionError("away")
        return calls

    answer = await retry_async(call, "testing", patience_s=None, on_wait=lambda reason, _: waits.append(reason))
    assert (answer, waits) == (3, ["stream:down", "stream:down"])


@pytest.mark.asyncio
async def test_async_retry_can_be_cancelled() -> None:
    async def call() -> int:
        raise redis.ConnectionError("away")

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await retry_async(call, "testing", patience_s=None)


def test_pauses_double_up_to_two_seconds() -> None:
    pauses = Pauses("testing", None)
    taken = [pauses.after(redis.ConnectionError("x")) for _ in range(10)]
    assert 0.025 <= taken[0] <= 0.05
    assert all(1.0 <= pause <= 2.0 for pause in taken[-3:])


def test_all_keys_of_a_run_share_one_hash_slot_and_are_documented() -> None:
    keys = Keys("my-run")
    for name in KEY_NAMES:
        assert getattr(keys, name) == f"arl:{{my-run}}:{name}"
        assert f"``{name}``" in (keys_module.__doc__ or "")
    assert keys.blob("a/{b}/0") == "arl:{my-run}:blob:a/{b}/0"
    assert len({getattr(keys, name) for name in KEY_NAMES}) == len(KEY_NAMES)


@pytest.mark.parametrize("run", ["", "a b", "a{b", "}", "a\n"])
def test_run_names_that_break_the_hash_tag_are_refused(run: str) -> None:
    with pytest.raises(ConfigError):
        Keys(run)


def test_server_module_offers_what_its_users_import() -> None:
    assert set(server.__all__) >= {"ensure", "release", "connect", "connect_async", "check_server", "EmbeddedServer"}


def test_every_key_is_in_the_documentation() -> None:
    text = (Path(__file__).parents[3] / "docs" / "stream.md").read_text()
    assert [name for name in (*KEY_NAMES, "blob:<id>") if f"| `{name}` |" not in text] == []


@pytest.mark.asyncio
async def test_a_cancellation_that_the_client_swallows_still_ends_the_call() -> None:
    async def swallows() -> str:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            return "the reply had arrived"
        return ""

    async def fails() -> str:
        await swallows()
        raise ConnectionError("cut")

    for call in (swallows, fails):
        task = asyncio.create_task(retry_async(call, "asking", patience_s=None))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=60)
        assert done
        assert task.cancelled()
