import pytest

from agentrl.rollout.circuit import CircuitBreaker
from agentrl.rollout.truncation import cut_to_tokens
from agentrl.testing.tiny_model import make_tiny_tokenizer


def test_a_circuit_opens_on_most_of_many_probes_while_open_and_closes_on_a_success() -> None:
    now = 0.0
    breaker = CircuitBreaker(window=10, min_calls=4, max_rate=0.5, cooldown_s=40, clock=lambda: now)
    assert [breaker.record(ok=False) for _ in range(3)] == ["", "", ""]
    assert breaker.allows()
    assert breaker.record(ok=False) == "opened"
    assert not breaker.allows()
    now = 5.0
    assert [breaker.allows(), breaker.allows()] == [True, False]
    assert breaker.record(ok=False) == ""
    assert breaker.record(ok=True) == "closed"
    assert (breaker.allows(), breaker.failed, breaker.seen) == (True, 0, 0)


def test_an_outage_of_seconds_is_probed_within_seconds_and_a_long_one_at_the_longest_pause() -> None:
    now = 0.0
    breaker = CircuitBreaker(window=10, min_calls=4, max_rate=0.5, cooldown_s=16, clock=lambda: now)

    def probes(until: float) -> list[float]:
        nonlocal now
        found: list[float] = []
        while now < until:
            now += 0.5
            if breaker.allows():
                found.append(now)
                breaker.record(ok=False)
        return found

    for _ in range(4):
        breaker.record(ok=False)
    assert probes(64.0) == [2.0, 6.0, 14.0, 30.0, 46.0, 62.0]
    breaker.record(ok=True)
    for _ in range(4):
        breaker.record(ok=False)
    assert probes(72.0) == [66.0, 70.0], "the next outage is another one"


def test_half_failures_do_not_open_a_circuit_of_one_half() -> None:
    breaker = CircuitBreaker(window=10, min_calls=4, max_rate=0.5, cooldown_s=5)
    for n in range(40):
        breaker.record(ok=n % 2 == 0)
    assert not breaker.is_open


TOKENIZER = make_tiny_tokenizer()


@pytest.mark.parametrize("text", ["", "7", "word " * 20, "é🧮漢字"])
def test_what_fits_is_left_alone(text: str) -> None:
    assert cut_to_tokens(TOKENIZER, text, 100) == text


def test_the_note_counts_what_is_missing() -> None:
    text = " ".join(["7"] * 100)  # 7 and a space: 199 tokens
    total = len(TOKENIZER.encode(text))
    cut = cut_to_tokens(TOKENIZER, text, 40)
    assert f"[… {total - 40} tokens cut …]" in cut
    assert len(TOKENIZER.encode(cut)) <= 42


@pytest.mark.parametrize("side", ["left", "right", "middle"])
@pytest.mark.parametrize("limit", [1, 3, 30, 200])
def test_megabytes_and_odd_characters_are_cut_within_the_limit(side: str, limit: int) -> None:
    for text in ("x" * 3_000_000, "漢🧮é " * 20_000):
        cut = cut_to_tokens(TOKENIZER, text, limit, side)  # type: ignore[arg-type]
        assert len(TOKENIZER.encode(cut)) <= limit + 4  # a character at the cut may be several tokens
