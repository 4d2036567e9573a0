"""The adapter over transformers' continuous batching: exact numbers, whatever happens to the weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from agentrl.errors import ConfigError
from agentrl.serving.embedded.checkpoint import CheckpointReader, copy_into
from agentrl.serving.embedded.continuous_batching import ContinuousBatch, Sampling, check_internals, cut, sample
from agentrl.serving.embedded_engine import load_model
from agentrl.testing.tiny_model import make_tiny_model

TOLERANCE = 1e-4
PROMPT = [(17 * i + 3) % 900 + 10 for i in range(45)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {"a": make_tiny_model(folder / "a", seed=0), "b": make_tiny_model(folder / "b", seed=1)}


@pytest.fixture(scope="module")
def plain(checkpoints: dict[str, Path]) -> dict[str, Any]:
    return {name: load_model(path, device="cpu", dtype="float32") for name, path in checkpoints.items()}


@pytest.fixture
def engine(checkpoints: dict[str, Path]) -> "Harness":
    return Harness(checkpoints)


class Harness:
    """A batch over checkpoint a, and what it generated."""

    def __init__(self, checkpoints: dict[str, Path], **sizes: int) -> None:
        self.model = load_model(checkpoints["a"], device="cpu", dtype="float32")
        self.reader = CheckpointReader(self.model, checkpoints["a"])
        self.checkpoints = checkpoints
        self.batch = ContinuousBatch(self.model, seed=0, **sizes)
        self.ids: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[float]] = {}
        self.done: set[str] = set()

    def add(self, name: str, prompt: Sequence[int], num_tokens: int, sampling: Sampling | None = None) -> None:
        self.ids[name], self.logprobs[name] = [], []
        self.done.discard(name)
        self.batch.add(name, prompt, max_new_tokens=num_tokens, stop_ids=[], sampling=sampling or Sampling())

    def step(self) -> None:
        for token in self.batch.step():
            self.ids[token.request_id].append(token.token)
            self.logprobs[token.request_id].append(token.logprob)
            if token.is_last:
                self.done.add(token.request_id)
                self.batch.finish(token.request_id)

    def run(self, *names: str, limit: int = 2000) -> None:
        for _ in range(limit):
            if self.done >= set(names):
                return
            self.step()
        raise AssertionError(f"only {self.done} of {names} finished after {limit} steps")

    def until(self, name: str, num_tokens: int) -> None:
        while len(self.ids[name]) < num_tokens:
            self.step()

    def load(self, checkpoint: str) -> None:
        copy_into(self.model, self.reader.stage(self.checkpoints[checkpoint]))
        self.batch.weights_changed()


def logprobs_of(model: Any, prompt: Sequence[int], output: Sequence[int], temperature: float = 1.0) -> list[float]:
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *output]])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits / temperature, dim=-1).gather(1, torch.tensor(output)[:, None])[:, 0].tolist()


def assert_close(got: Sequence[float], wanted: Sequence[float]) -> None:
    torch.testing.assert_close(torch.tensor(got), torch.tensor(wanted), rtol=0, atol=TOLERANCE)


# ---------------------------------------------------------------------- the sampler


def test_logprob_is_of_the_whole_scaled_distribution_whatever_restricts_the_draw() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(3, -1)
    sampling = [Sampling(temperature=0.5, top_k=1), Sampling(temperature=0.0), Sampling(top_p=0.1)]
    tokens, logprobs = sample(logits, sampling, torch.Generator().manual_seed(0))
    assert tokens.tolist() == [0, 0, 0]
    expected = [torch.log_softmax(logits[0] / t, dim=0)[0] for t in (0.5, 1.0, 1.0)]
    assert_close(logprobs.tolist(), torch.stack(expected).tolist())


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(), [0.15, 0.5, 0.05, 0.3]),
        (Sampling(top_k=2), [0.0, 0.5, 0.0, 0.3]),
        (Sampling(top_p=0.45), [0.0, 0.5, 0.0, 0.0]),
        (Sampling(top_p=0.75), [0.0, 0.5, 0.0, 0.3]),
        (Sampling(min_p=0.25), [0.15, 0.5, 0.0, 0.3]),
        (Sampling(top_k=3, top_p=0.85, min_p=0.4), [0.0, 0.5, 0.0, 0.3]),
        (Sampling(min_p=1.0), [0.0, 0.5, 0.0, 0.0]),
    ],
)
def test_cut_keeps_exactly_what_top_k_top_p_and_min_p_allow(sampling: Sampling, kept: list[float]) -> None:
    assert cut(torch.tensor([[0.15, 0.5, 0.05, 0.3]]), [sampling]).tolist() == torch.tensor([kept]).tolist()


def test_draws_follow_the_scaled_distribution() -> None:
    logits = torch.tensor([1.5, 0.0, -0.5, 1.0])
    tokens, _ = sample(logits.expand(20000, -1), [Sampling(temperature=1.3)] * 20000, torch.Generator().manual_seed(3))
    frequencies = torch.bincount(tokens, minlength=4) / 20000
    torch.testing.assert_close(frequencies, (logits / 1.3).softmax(dim=0), rtol=0, atol=0.015)


# ---------------------------------------------------------------------- generation


def test_tokens_of_mixed_requests_carry_the_logprobs_of_a_plain_forward_pass(engine: Harness, plain: dict[str, Any]) -> None:
    temperatures = {"cold": 0.3, "one": 1.0, "hot": 2.0}
    for name, temperature in temperatures.items():
        engine.add(name, PROMPT, 30, Sampling(temperature=temperature, top_k=50))
    engine.run(*temperatures)
    for name, temperature in temperatures.items():
        assert_close(engine.logprobs[name], logprobs_of(plain["a"], PROMPT, engine.ids[name], temperature))


def test_stop_id_ends_a_request_and_is_kept(engine: Harness) -> None:
    engine.add("free", PROMPT, 12, Sampling(temperature=0))
    engine.run("free")
    stop = engine.ids["free"][5]
    first = engine.ids["free"].index(stop)
    engine.ids["stopped"], engine.logprobs["stopped"] = [], []
    engine.batch.add("stopped", PROMPT, max_new_tokens=12, stop_ids=[stop], sampling=Sampling(temperature=0))
    engine.run("stopped")
    assert engine.ids["stopped"] == engine.ids["free"][: first + 1]


def test_prompt_of_a_finished_request_is_found_in_the_cache_even_after_a_single_step(engine: Harness) -> None:
    engine.add("first", PROMPT, 1)
    engine.run("first")
    engine.add("second", PROMPT, 2)
    engine.until("second", 1)
    assert engine.batch.cached_tokens("second") == 32


def test_cancelled_and_finished_requests_leave_no_cache_behind(engine: Harness) -> None:
    for i in range(6):
        engine.add(f"r{i}", [*PROMPT, i], 40)
    engine.until("r0", 5)
    assert engine.batch.used_tokens > 0
    engine.batch.cancel(["r1", "r4", "nobody"])
    engine.run("r0", "r2", "r3", "r5")
    assert (engine.batch.used_tokens, engine.batch.num_active, engine.batch.num_waiting) == (0, 0, 0)
    assert engine.ids["r1"]
    assert len(engine.ids["r1"]) < 40


def test_score_is_the_prompts_logprobs(engine: Harness, plain: dict[str, Any]) -> None:
    long = (PROMPT * 8)[:300]
    assert_close(engine.batch.score(long), logprobs_of(plain["a"], long[:1], long[1:]))
    assert engine.batch.score([5]) == []


# ---------------------------------------------------------------------- weights


def test_update_in_place_lets_nobody_find_blocks_of_the_old_weights(engine: Harness, plain: dict[str, Any]) -> None:
    engine.add("survivor", PROMPT, 120)
    engine.until("survivor", 30)
    engine.load("b")
    engine.add("same prompt", PROMPT, 20)
    engine.add("same prefix", [*PROMPT, *engine.ids["survivor"][:20]], 20)
    engine.run("same prompt", "same prefix")
    assert "survivor" not in engine.done
    assert_close(engine.logprobs["same prompt"], logprobs_of(plain["b"], PROMPT, engine.ids["same prompt"]))
    shared = [*PROMPT, *engine.ids["survivor"][:20]]
    assert_close(engine.logprobs["same prefix"], logprobs_of(plain["b"], shared, engine.ids["same prefix"]))


def test_next_turn_after_an_update_in_place_does_not_use_the_mixed_cache(engine: Harness, plain: dict[str, Any]) -> None:
    engine.add("first", PROMPT, 100)
    engine.until("first", 25)
    engine.load("b")
    engine.run("first")
    boundary = logprobs_of(plain["a"], PROMPT, engine.ids["first"])
    assert_close(engine.logprobs["first"][:25], boundary[:25])
    assert abs(engine.logprobs["first"][25] - boundary[25]) > TOLERANCE
    context = [*PROMPT, *engine.ids["first"], 5, 6, 7]
    for turn in ("second", "third"):
        engine.add(turn, context, 10)
        engine.until(turn, 1)
        assert engine.batch.cached_tokens(turn) == (0 if turn == "second" else 144)
        engine.run(turn)
        assert_close(engine.logprobs[turn], logprobs_of(plain["b"], context, engine.ids[turn]))


def test_retracted_requests_continue_exactly_under_the_new_weights_and_in_their_order(
    engine: Harness, plain: dict[str, Any]
) -> None:
    names = [f"r{i}" for i in range(5)]
    for i, name in enumerate(names):
        engine.add(name, [*PROMPT[: 20 + i]], 60)
    engine.until("r4", 10)
    counts = {name: len(engine.ids[name]) for name in names}
    assert engine.batch.retract() == names
    assert (engine.batch.num_active, engine.batch.used_tokens) == (0, 0)
    engine.load("b")
    engine.run(*names)
    for i, name in enumerate(names):
        prompt, ids, split = PROMPT[: 20 + i], engine.ids[name], counts[name]
        assert len(ids) == 60
        assert_close(engine.logprobs[name][:split], logprobs_of(plain["a"], prompt, ids)[:split])
        assert_close(engine.logprobs[name][split:], logprobs_of(plain["b"], prompt, ids)[split:])


def test_request_still_waiting_at_an_update_belongs_to_the_new_weights(
    checkpoints: dict[str, Path], plain: dict[str, Any]
) -> None:
    engine = Harness(checkpoints, max_running_requests=1)
    engine.add("runs", PROMPT, 20)
    engine.add("waits", PROMPT, 20)
    engine.until("runs", 5)
    engine.load("b")
    engine.run("runs", "waits")
    assert_close(engine.logprobs["waits"], logprobs_of(plain["b"], PROMPT, engine.ids["waits"]))
    engine.add("again", PROMPT, 20)
    engine.until("again", 1)
    assert engine.batch.cached_tokens("again") == 32
    engine.run("again")
    assert_close(engine.logprobs["again"], logprobs_of(plain["b"], PROMPT, engine.ids["again"]))


# ---------------------------------------------------------------------- little memory


def test_more_requests_than_memory_all_finish_exactly(checkpoints: dict[str, Path], plain: dict[str, Any]) -> None:
    engine = Harness(checkpoints, num_blocks=16, page_size=4, max_running_requests=8)
    assert engine.batch.capacity_tokens == 64
    names = [f"r{i}" for i in range(8)]
    for i, name in enumerate(names):
        engine.add(name, [*PROMPT[:10], i + 1], 40)
    engine.run(*names)
    for i, name in enumerate(names):
        assert len(engine.ids[name]) == 40
        assert_close(engine.logprobs[name], logprobs_of(plain["a"], [*PROMPT[:10], i + 1], engine.ids[name]))


def test_update_in_place_under_memory_pressure_still_lets_nobody_find_old_blocks(
    checkpoints: dict[str, Path], plain: dict[str, Any]
) -> None:
    engine = Harness(checkpoints, num_blocks=16, page_size=4, max_running_requests=8)
    names = [f"r{i}" for i in range(6)]
    for i, name in enumerate(names):
        engine.add(name, [*PROMPT[:10], i + 1], 40)
    engine.until("r0", 12)
    engine.load("b")
    engine.run(*names)
    for i in range(6):
        prompt = [*PROMPT[:10], i + 1, *engine.ids[f"r{i}"][:8]]
        engine.add("after", prompt, 6)
        engine.run("after")
        assert_close(engine.logprobs["after"], logprobs_of(plain["b"], prompt, engine.ids["after"]))


def test_cancelling_what_took_the_memory_lets_the_waiting_in(checkpoints: dict[str, Path]) -> None:
    engine = Harness(checkpoints, num_blocks=16, page_size=4, max_running_requests=4)
    for i in range(4):
        engine.add(f"big{i}", [*PROMPT[:10], i + 1], 50)
    while not engine.batch._scheduler.block_new_requests:  # the library's own sign that it ran short
        engine.step()
    engine.batch.cancel([f"big{i}" for i in range(4)])
    engine.add("small", PROMPT[:8], 4)
    engine.run("small", limit=50)
    assert len(engine.ids["small"]) == 4


# ---------------------------------------------------------------------- the library


def test_library_with_other_internals_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.generation.continuous_batching import cache

    check_internals()
    monkeypatch.setattr(cache.PagedAttentionCache, "search_prefix_match", lambda self, tokens: 0)
    with pytest.raises(ConfigError, match=r"search_prefix_match takes \['tokens'\].*written for 5\.23"):
        check_internals()
    monkeypatch.delattr(cache.PagedAttentionCache, "search_prefix_match")
    with pytest.raises(ConfigError, match="search_prefix_match is gone"):
        check_internals()


def test_batch_that_cannot_give_every_request_a_token_is_refused(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="max_batch_tokens=8"):
        Harness(checkpoints, max_batch_tokens=8, max_running_requests=32)
