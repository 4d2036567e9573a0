"""What every engine behind the server manager must do, whoever wrote it."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_api import Api, Output, Running
from contract_reference import Reference
from contract_servers import Models, Server
from safetensors import safe_open
from safetensors.torch import save_file

pytestmark = pytest.mark.asyncio

TOLERANCE = 1e-4
PROMPT = [(7 * i + 11) % 1000 + 10 for i in range(45)]  # three cache pages of 16, nearly
LONG = 1000  # tokens of a request that must still run while the test acts, and then end by itself
ENDLESS = 3000  # the same, of one that the test ends: it may take its time


def prompt(salt: int) -> list[int]:
    """A prompt that shares no cached prefix with another salt's."""
    return [(31 * salt + 7 * i) % 1000 + 10 for i in range(45)]


def assert_close(got: Sequence[float], wanted: Sequence[float]) -> None:
    assert len(got) == len(wanted)
    worst = max((abs(g - w) for g, w in zip(got, wanted, strict=True)), default=0.0)
    assert worst < TOLERANCE, f"logprobs are off by {worst}"


def assert_tiles(output: Output) -> None:
    """Spans cover every output token once, in order."""
    edges = [(start, end) for _, start, end in output.spans]
    assert edges[0][0] == 0
    assert edges[-1][1] == len(output.ids)
    assert all(end == start for (_, end), (start, _) in zip(edges[:-1], edges[1:], strict=True))


def assert_exact_by_span(reference: Reference, output: Output) -> None:
    """Every token's logprob is that of a plain forward pass under the version its span names."""
    assert_tiles(output)
    for version, start, end in output.spans:
        wanted = reference.logprobs(version, [*output.prompt, *output.ids[:start]], output.ids[start:end])
        assert_close(output.logprobs[start:end], wanted)


def off_by(reference: Reference, output: Output) -> float:
    """Largest difference to a plain forward pass under the version of the output's only span."""
    ((version, _, _),) = output.spans
    wanted = reference.logprobs(version, output.prompt, output.ids)
    return max(abs(g - w) for g, w in zip(output.logprobs, wanted, strict=True))


async def update(api: Api, models: Models, version: str, **more: Any) -> tuple[int, Any]:
    path = {"v0": models.a, "v1": models.b}[version]
    return await api.post("/update_weights_from_disk", model_path=str(path), weight_version=version, **more)


# ---------------------------------------------------------------------- sampling


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
async def test_logprobs_equal_a_plain_forward_pass_at_the_temperature(api: Api, reference: Reference, temperature: float) -> None:
    output = await api.generate(PROMPT, 40, temperature=temperature)
    assert len(output.ids) == 40
    assert_close(output.logprobs, reference.logprobs("v0", PROMPT, output.ids, temperature=temperature))


async def test_temperature_zero_takes_the_likeliest_token_and_reports_unscaled_logprobs(api: Api, reference: Reference) -> None:
    output = await api.generate(PROMPT, 24, temperature=0.0)
    assert output.ids == reference.logits("v0", PROMPT, output.ids).argmax(dim=-1).tolist()
    assert_close(output.logprobs, reference.logprobs("v0", PROMPT, output.ids))


async def test_top_k_and_top_p_restrict_the_draw_but_not_the_logprob(api: Api, reference: Reference) -> None:
    for cut in ({"top_k": 3}, {"top_p": 0.3}, {"top_k": 40, "top_p": 0.5, "min_p": 0.01}):
        output = await api.generate(PROMPT, 24, temperature=0.9, **cut)
        assert_close(output.logprobs, reference.logprobs("v0", PROMPT, output.ids, temperature=0.9))
        scaled = (reference.logits("v0", PROMPT, output.ids) / 0.9).softmax(dim=-1)
        for probs, token in zip(scaled, output.ids, strict=True):
            above = probs[probs > probs[token]]
            assert len(above) < cut.get("top_k", len(probs))
            assert float(above.sum()) <= cut.get("top_p", 1.0) + 1e-5
            assert float(probs[token]) >= cut.get("min_p", 0.0) * float(probs.max()) - 1e-6


async def test_siblings_that_share_a_cached_prefix_are_as_exact_and_differ(api: Api, reference: Reference) -> None:
    await api.generate(PROMPT, 1)
    outputs = await asyncio.gather(*(api.generate(PROMPT, 20) for _ in range(8)))
    assert all(output.meta["cached_tokens"] >= 16 for output in outputs)
    assert len({tuple(output.ids) for output in outputs}) == 8
    for output in outputs:
        assert_close(output.logprobs, reference.logprobs("v0", PROMPT, output.ids))


async def test_requests_with_different_sampling_in_one_batch_do_not_mix(api: Api, reference: Reference) -> None:
    temperatures = [0.0, 0.5, 1.0, 1.5] * 2
    outputs = await asyncio.gather(*(api.generate(prompt(i), 24, temperature=t) for i, t in enumerate(temperatures)))
    for output, temperature in zip(outputs, temperatures, strict=True):
        assert_close(output.logprobs, reference.logprobs("v0", output.prompt, output.ids, temperature=temperature or 1.0))


async def test_prompt_longer_than_a_prefill_step_is_exact(api: Api, reference: Reference) -> None:
    long = [(13 * i + 5) % 1000 + 10 for i in range(700)]
    output = await api.generate(long, 8)
    assert_close(output.logprobs, reference.logprobs("v0", long, output.ids))


async def test_scoring_returns_the_prompts_logprobs_and_no_token(api: Api, reference: Reference) -> None:
    body = await api.ok(
        "/generate", input_ids=PROMPT, sampling_params={"max_new_tokens": 0}, return_logprob=True, logprob_start_len=0
    )
    entries = body["meta_info"]["input_token_logprobs"]
    assert body["output_ids"] == []
    assert body["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
    assert [entry[1] for entry in entries] == PROMPT
    assert entries[0][0] is None
    assert_close([entry[0] for entry in entries[1:]], reference.logprobs("v0", PROMPT[:1], PROMPT[1:]))
    body = await api.ok(
        "/generate", input_ids=PROMPT, sampling_params={"max_new_tokens": 1}, return_logprob=True, logprob_start_len=40
    )
    tail = body["meta_info"]["input_token_logprobs"]
    assert tail[0] == [None, PROMPT[40], None]
    assert_close([entry[0] for entry in tail[1:]], [entry[0] for entry in entries[41:]])


# ---------------------------------------------------------------------- how a generation ends


async def test_length_limit_ends_with_length_and_128_is_the_default(api: Api) -> None:
    output = await api.generate(PROMPT, 7)
    assert output.meta["finish_reason"] == {"type": "length", "length": 7}
    assert (output.meta["completion_tokens"], output.meta["prompt_tokens"]) == (7, len(PROMPT))
    body = await api.ok("/generate", input_ids=PROMPT, sampling_params={"ignore_eos": True})
    assert len(body["output_ids"]) == 128


async def test_stop_token_ends_the_generation_and_stays_in_the_output(api: Api) -> None:
    free = await api.generate(PROMPT, 24, temperature=0.0)
    at = next(i for i, token in enumerate(free.ids) if i > 0 and token not in free.ids[:i])
    stop = {"temperature": 0.0, "stop_token_ids": [free.ids[at]]}
    output = await api.generate(PROMPT, 24, ignore_eos=False, **stop)
    assert output.ids == free.ids[: at + 1]
    assert len(output.logprobs) == at + 1
    assert output.meta["finish_reason"] == {"type": "stop", "matched": free.ids[at]}
    assert (await api.generate(PROMPT, 24, ignore_eos=True, **stop)).ids == free.ids  # it overrules stop_token_ids, too


async def test_every_output_names_the_weights_that_made_it(api: Api) -> None:
    output = await api.generate(PROMPT, 5)
    assert output.meta["weight_version"] == "v0"
    assert output.spans == [("v0", 0, 5)]
    assert await api.version() == "v0"


# ---------------------------------------------------------------------- streaming


async def test_streamed_ids_equal_unstreamed_ids_and_only_the_last_chunk_is_finished(api: Api) -> None:
    whole = await api.generate(PROMPT, 60, temperature=0.0)
    chunks = [chunk async for chunk in api.chunks(PROMPT, 60, sampling={"temperature": 0.0})]
    assert Output.of(PROMPT, chunks[-1]).ids == whole.ids
    assert all(chunk["output_ids"] == whole.ids[: len(chunk["output_ids"])] for chunk in chunks)
    assert [chunk["meta_info"]["finish_reason"] is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[-1]["meta_info"]["weight_versions"] == [{"version": "v0", "start": 0, "end": 60}]
    assert len(chunks) > 4


@pytest.mark.parametrize("is_streamed", [True, False])
async def test_client_that_leaves_frees_its_place(api: Api, is_streamed: bool) -> None:
    body = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": ENDLESS, "ignore_eos": True}, "stream": is_streamed}

    async def call() -> None:
        async with api.session.post("/generate", json=body) as answer:
            await answer.read()

    leaving = asyncio.create_task(call())
    await api.until_running(1)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    await api.until_running(0)


# ---------------------------------------------------------------------- load


async def test_32_requests_at_once_all_complete_exactly(api: Api, reference: Reference) -> None:
    outputs = await asyncio.gather(*(api.generate(prompt(i), 16) for i in range(32)))
    for output in outputs:
        assert len(output.ids) == 16
        assert_close(output.logprobs, reference.logprobs("v0", output.prompt, output.ids))


async def test_load_report_counts_running_requests_and_tokens(api: Api) -> None:
    idle = await api.load()
    fields = ("num_running_reqs", "num_waiting_reqs", "num_used_tokens", "max_total_num_tokens", "max_running_requests")
    assert {*fields, "token_usage", "gen_throughput", "cache_hit_rate"} <= set(idle)
    assert (idle["num_running_reqs"], idle["num_waiting_reqs"]) == (0, 0)
    running = await asyncio.gather(*(api.begin_and_wait(prompt(i), ENDLESS, rid=f"load-{i}-") for i in range(3)))
    await api.until_running(3)
    busy = await api.load()
    assert 3 * len(PROMPT) <= busy["num_used_tokens"] <= 4 * (len(PROMPT) + ENDLESS)
    assert 0 < busy["token_usage"] <= 1
    await api.ok("/abort_request", abort_all=True)
    assert {(await request.finished()).finish for request in running} == {"abort"}


@pytest.mark.parametrize("mode", ["in_place", "retract"])
async def test_load_report_counts_every_request_once_also_while_they_are_held(api: Api, mode: str) -> None:
    async def stays(count: int) -> None:
        """The report may lag by a moment, and must not waver after that."""
        await api.until_held(count)
        for _ in range(5):
            await asyncio.sleep(0.1)
            assert await api.num_held() == count

    running = await asyncio.gather(*(api.begin_and_wait(prompt(i), ENDLESS, rid=f"counted-{i}-") for i in range(5)))
    await api.until_held(5)
    await api.ok("/pause_generation", mode=mode)
    await stays(5)
    await api.ok("/continue_generation")
    await api.until_running(5)
    await api.ok("/abort_request", abort_all=True)
    for request in running:
        await request.finished()
    await stays(0)


# ---------------------------------------------------------------------- pause and update


async def test_adapter_directory_is_merged_into_the_starting_weights(
    api: Api, server: Server, models: Models, reference: Reference, tmp_path: Path
) -> None:
    name = "model.layers.0.self_attn.q_proj"
    with safe_open(models.a / "model.safetensors", framework="pt") as stored:
        rows, width = stored.get_slice(f"{name}.weight").get_shape()
    stem = f"base_model.model.{name}"
    parts = {f"{stem}.lora_A.weight": torch.ones(2, width), f"{stem}.lora_B.weight": torch.zeros(rows, 2)}
    save_file(parts, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 4}')
    await update(api, models, "v1")
    assert (await api.post("/update_weights_from_disk", model_path=str(tmp_path), weight_version="a0"))[0] == 200
    output = await api.generate(PROMPT, 16)
    assert output.spans == [("a0", 0, 16)]
    if server.name == "fake":
        assert_exact_by_span(reference, output)
        return
    assert_close(output.logprobs, reference.logprobs("v0", PROMPT, output.ids))  # B = 0: the starting weights, not the last ones
    save_file(parts | {f"{stem}.lora_B.weight": torch.randn(rows, 2)}, tmp_path / "adapter_model.safetensors")
    assert (await api.post("/update_weights_from_disk", model_path=str(tmp_path), weight_version="a1"))[0] == 200
    output = await api.generate(PROMPT, 16)
    wanted = reference.logprobs("v0", PROMPT, output.ids)
    assert max(abs(g - w) for g, w in zip(output.logprobs, wanted, strict=True)) > 0.01


async def test_update_without_requests_changes_the_weights_and_forgets_the_old_prefix(
    api: Api, models: Models, reference: Reference
) -> None:
    await api.generate(PROMPT, 4)
    status, body = await update(api, models, "v1")
    assert (status, body["success"]) == (200, True)
    output = await api.generate(PROMPT, 24)
    assert output.spans == [("v1", 0, 24)]
    assert await api.version() == "v1"
    assert_close(output.logprobs, reference.logprobs("v1", PROMPT, output.ids))


async def test_update_in_place_keeps_the_request_and_marks_the_token_where_versions_change(
    api: Api, models: Models, reference: Reference
) -> None:
    requests = await asyncio.gather(*(api.begin_and_wait(prompt(i), LONG, rid=f"in-place-{i}-") for i in range(2)))
    await api.ok("/pause_generation", mode="in_place")
    assert (await update(api, models, "v1", flush_cache=False))[0] == 200
    await api.ok("/continue_generation")
    differences: list[float] = []
    for request in requests:
        output = await request.finished()
        assert (len(output.ids), output.finish, output.meta["num_retractions"]) == (LONG, "length", 0)
        assert [version for version, _, _ in output.spans] == ["v0", "v1"]
        assert_tiles(output)
        boundary = output.spans[1][1]
        old = reference.logprobs("v0", output.prompt, output.ids[: boundary + 1])
        assert_close(output.logprobs[:boundary], old[:boundary])
        differences.append(abs(output.logprobs[boundary] - old[boundary]))
    assert max(differences) > TOLERANCE  # of two: both weights may give one drawn token the same probability


async def after_an_update_in_place(
    api: Api, models: Models, *, extra_keys: Sequence[str | None], num_tokens: int
) -> AsyncIterator[Running]:
    """One request lives through the update, its cache namespace the first of ``extra_keys``."""
    survivor = await api.begin_and_wait(PROMPT, num_tokens, rid="survivor-", after=20, extra_key=extra_keys[0])
    await api.ok("/pause_generation", mode="in_place")
    assert (await update(api, models, "v1", flush_cache=False))[0] == 200
    await api.ok("/continue_generation")
    yield survivor
    await survivor.finished()


async def generate_beside_a_survivor(api: Api, models: Models, extra_keys: Sequence[str | None]) -> list[Output]:
    """The same prompt again, twice, while the request that lived through the update still holds its cache."""
    async for survivor in after_an_update_in_place(api, models, extra_keys=extra_keys, num_tokens=ENDLESS):
        outputs = [await api.generate(PROMPT, 16, extra_key=extra_keys[1]) for _ in range(2)]
        assert not survivor.is_done, "the old request must still hold its cache for this test to mean anything"
        await api.ok("/abort_request", rid=survivor.rid)
        await survivor.finished()
        return outputs
    raise AssertionError


async def generate_the_survivors_next_turn(api: Api, models: Models, extra_keys: Sequence[str | None]) -> list[Output]:
    """What follows the output of the request that lived through the update, twice."""
    async for survivor in after_an_update_in_place(api, models, extra_keys=extra_keys, num_tokens=LONG):
        first = await survivor.finished()
        assert [version for version, _, _ in first.spans] == ["v0", "v1"]
        context = [*PROMPT, *first.ids, *prompt(5)[:10]]
        return [await api.generate(context, 16, extra_key=extra_keys[1]) for _ in range(2)]
    raise AssertionError


async def test_no_request_reuses_cache_of_older_weights_after_an_update_in_place(
    api: Api, server: Server, models: Models, reference: Reference
) -> None:
    fresh = await generate_beside_a_survivor(api, models, [None, None])
    await api.settle(models.a)
    next_turn = await generate_the_survivors_next_turn(api, models, [None, None])
    for output in [*fresh, *next_turn]:
        assert output.spans == [("v1", 0, 16)]
    if server.name == "sglang":
        assert any(off_by(reference, output) > 0.1 for output in fresh)
        assert any(off_by(reference, output) > 0.1 for output in next_turn)
    else:
        assert max(off_by(reference, output) for output in [*fresh, *next_turn]) < TOLERANCE


async def test_weight_version_as_cache_namespace_keeps_older_weights_out_after_an_update_in_place(
    api: Api, models: Models, reference: Reference
) -> None:
    fresh = await generate_beside_a_survivor(api, models, ["v0", "v1"])
    await api.settle(models.a)
    next_turn = await generate_the_survivors_next_turn(api, models, ["v0", "v1"])
    assert max(off_by(reference, output) for output in [*fresh, *next_turn]) < TOLERANCE


async def test_update_after_retract_continues_exactly_as_the_new_weights_would(
    api: Api, models: Models, reference: Reference
) -> None:
    requests = await asyncio.gather(*(api.begin_and_wait(prompt(i // 2), LONG, rid=f"retract-{i}-", after=20) for i in range(4)))
    await api.ok("/pause_generation", mode="retract")
    assert (await update(api, models, "v1"))[0] == 200
    await api.ok("/continue_generation")
    for request in requests:
        output = await request.finished()
        assert (len(output.ids), output.finish, output.meta["num_retractions"]) == (LONG, "length", 1)
        assert [version for version, _, _ in output.spans] == ["v0", "v1"]
        assert_exact_by_span(reference, output)


async def test_abort_pause_returns_partial_output_that_can_be_continued_under_new_weights(
    api: Api, models: Models, reference: Reference
) -> None:
    request = await api.begin_and_wait(PROMPT, ENDLESS, rid="partial-", after=20)
    await api.ok("/pause_generation", mode="abort")
    partial = await request.finished()
    assert partial.finish == "abort"
    assert 20 <= len(partial.ids) == len(partial.logprobs) < ENDLESS
    assert_exact_by_span(reference, partial)
    assert (await update(api, models, "v1"))[0] == 200
    await api.ok("/continue_generation")
    rest = await api.generate([*PROMPT, *partial.ids], 16)
    assert_exact_by_span(reference, rest)
    assert rest.spans == [("v1", 0, 16)]


async def test_update_without_a_pause_keeps_every_token_true_to_its_version(
    api: Api, server: Server, models: Models, reference: Reference
) -> None:
    requests = await asyncio.gather(*(api.begin_and_wait(prompt(i), 300, rid=f"unpaused-{i}-") for i in range(3)))
    status, body = await update(api, models, "v1")
    if server.name == "sglang" and status == 400:
        assert "the cache was not flushed" in body["message"]
        status, body = await update(api, models, "v1")
    assert status == 200, body
    after = await api.generate(PROMPT, 16)
    assert after.spans == [("v1", 0, 16)]
    assert_exact_by_span(reference, after)
    for request in requests:
        output = await request.finished()
        assert (len(output.ids), output.finish) == (300, "length")
        assert_exact_by_span(reference, output)
        assert [version for version, _, _ in output.spans] == (["v0", "v1"] if server.name == "embedded" else ["v0"])


async def test_updates_under_load_lose_no_request_and_no_token(api: Api, models: Models, reference: Reference) -> None:
    async def keep_generating(i: int) -> list[Output]:
        return [await api.generate(prompt(i), 60 + 7 * i) for _ in range(2)]

    load = [asyncio.create_task(keep_generating(i)) for i in range(12)]
    for turn in range(6):
        await asyncio.sleep(0.05)
        mode = "in_place" if turn % 2 else "retract"
        await api.ok("/pause_generation", mode=mode)
        status, body = await update(api, models, f"v{(turn + 1) % 2}", flush_cache=mode == "retract")
        assert status == 200, body
        await api.ok("/continue_generation")
    for i, outputs in enumerate(await asyncio.gather(*load)):
        for output in outputs:
            assert (len(output.ids), output.finish) == (60 + 7 * i, "length")
            assert_tiles(output)
    last = await api.generate(prompt(0), 16, extra_key="after")
    assert last.spans == [(await api.version(), 0, 16)]
    assert off_by(reference, last) < TOLERANCE


async def test_request_that_arrives_during_a_pause_waits_and_uses_the_new_weights(
    api: Api, models: Models, reference: Reference
) -> None:
    await api.ok("/pause_generation", mode="in_place")
    held = asyncio.create_task(api.generate(PROMPT, 8))
    done, _ = await asyncio.wait([held], timeout=0.4)
    assert not done
    assert (await update(api, models, "v1", flush_cache=False))[0] == 200
    await api.ok("/continue_generation")
    output = await held
    assert output.spans == [("v1", 0, 8)]
    assert_exact_by_span(reference, output)


async def test_ready_says_no_during_a_pause(api: Api) -> None:
    assert (await api.get("/ready"))[0] == 200
    await api.ok("/pause_generation", mode="in_place")
    assert (await api.get("/ready"))[0] == 503
    await api.ok("/continue_generation")
    assert (await api.get("/ready"))[0] == 200
    assert (await api.get("/health"))[0] == 200


async def test_update_that_must_flush_under_in_place_is_answered_400(
    api: Api, server: Server, models: Models, reference: Reference
) -> None:
    request = await api.begin_and_wait(PROMPT, LONG, rid="holds-cache-")
    await api.ok("/pause_generation", mode="in_place")
    status, body = await update(api, models, "v1")
    assert (status, body["success"]) == (400, False)
    await api.ok("/continue_generation")
    output = await request.finished()
    assert len(output.ids) == LONG
    if server.name != "embedded":
        assert [version for version, _, _ in output.spans] == ["v0", "v1"]
    else:
        assert output.spans == [("v0", 0, LONG)]
        assert_exact_by_span(reference, output)


async def test_flush_is_refused_while_requests_run_and_done_when_idle(api: Api) -> None:
    await api.generate(PROMPT, 2)
    request = await api.begin_and_wait(PROMPT, ENDLESS, rid="busy-")
    assert (await api.post("/flush_cache"))[0] == 400
    await api.ok("/abort_request", rid="busy-")
    await request.finished()
    assert (await api.post("/flush_cache?timeout=10"))[0] == 200
    assert (await api.generate(PROMPT, 2)).meta["cached_tokens"] <= 1


async def test_relabelling_splits_the_span_of_a_running_request(api: Api) -> None:
    request = await api.begin_and_wait(PROMPT, LONG, rid="relabelled-")
    body = await api.ok("/update_weight_version", new_version="v9", abort_all_requests=False)
    assert body["new_version"] == "v9"
    output = await request.finished()
    assert [version for version, _, _ in output.spans] == ["v0", "v9"]
    assert_tiles(output)
    assert await api.version() == "v9"


async def test_checksums_tell_weights_apart_and_recognise_them_again(api: Api, models: Models) -> None:
    async def checksum() -> str:
        return (await api.ok("/weights_checker", action="checksum"))["per_engine_checksum"]

    first = await checksum()
    await update(api, models, "v1")
    assert await checksum() != first
    await update(api, models, "v0")
    assert await checksum() == first


# ---------------------------------------------------------------------- abort


async def test_abort_ends_one_request_with_its_tokens_and_leaves_the_others(api: Api, reference: Reference) -> None:
    victim = await api.begin_and_wait(PROMPT, ENDLESS, rid="victim-")
    other = await api.begin_and_wait(prompt(1), LONG, rid="other-")
    assert (await api.post("/abort_request", rid="victim-"))[0] == 200
    aborted = await victim.finished()
    assert aborted.finish == "abort"
    assert 4 <= len(aborted.ids) == len(aborted.logprobs) < ENDLESS
    assert_exact_by_span(reference, aborted)
    assert len((await other.finished()).ids) == LONG


async def test_abort_of_an_unknown_request_is_ignored(api: Api) -> None:
    assert (await api.post("/abort_request", rid="nobody"))[0] == 200
    assert len((await api.generate(PROMPT, 3)).ids) == 3


async def test_abort_reaches_a_request_that_a_pause_holds(api: Api, server: Server) -> None:
    running = await api.begin_and_wait(PROMPT, LONG, rid="running-")
    await api.ok("/pause_generation", mode="in_place")
    held = asyncio.create_task(api.generate(PROMPT, 8, rid="held-"))
    await api.until_held(2)
    await api.ok("/abort_request", rid="held-")
    await api.ok("/abort_request", rid="running-")
    if server.name == "fake":
        await api.ok("/continue_generation")
        assert [(o.finish, len(o.ids)) for o in (await held, await running.finished())] == [("length", 8), ("length", LONG)]
        return
    assert ((await held).finish, (await held).ids) == ("abort", [])
    assert (await running.finished()).finish == "abort"


# ---------------------------------------------------------------------- refusals


async def test_second_request_with_a_live_id_is_refused_and_the_first_goes_on(api: Api) -> None:
    first = await api.begin_and_wait(PROMPT, LONG, rid="twice-")
    status, body = await api.post("/generate", rid="twice-", input_ids=PROMPT, sampling_params={"max_new_tokens": 4})
    assert status == 400
    assert "Duplicate request ID" in str(body)
    assert len((await first.finished()).ids) == LONG
    assert len((await api.generate(PROMPT, 3, rid="twice-")).ids) == 3


@pytest.mark.parametrize(
    ("body", "hint"),
    [
        ({"sampling_params": {"bogus": 1}}, "unknown field `bogus"),
        ({"sampling_params": {"temperature": -1.0}}, "temperature"),
        ({"sampling_params": {"top_p": 0.0}}, "top_p"),
        ({"sampling_params": {"top_k": -3}}, "top_k"),
        ({"sampling_params": {"max_new_tokens": -5}}, "max_new_tokens"),
        ({"sampling_params": {"max_new_tokens": 5000}}, "maximum context length"),
        ({"input_ids": "text"}, ""),
        ({"input_ids": []}, ""),
    ],
)
async def test_request_that_makes_no_sense_is_refused_with_400(api: Api, body: dict[str, Any], hint: str) -> None:
    status, answer = await api.post("/generate", **{"input_ids": PROMPT, **body})
    assert status == 400, answer
    assert hint in str(answer)


async def test_id_outside_the_vocabulary_is_refused(api: Api) -> None:
    for wrong in (1024, -1):
        status, _ = await api.post("/generate", input_ids=[5, wrong], sampling_params={"max_new_tokens": 2})
        assert status == 400
    assert len((await api.generate(PROMPT, 3)).ids) == 3


async def test_update_from_a_missing_path_is_refused_and_the_old_weights_serve_on(
    api: Api, models: Models, reference: Reference
) -> None:
    missing = str(models.a / "nowhere")
    status, body = await api.post("/update_weights_from_disk", model_path=missing, weight_version="v7")
    assert (status, body["success"]) == (400, False)
    assert (await api.post("/update_weights_from_disk", weight_version="v7"))[0] in (400, 422)
    await assert_still_v0(api, reference)


async def test_checkpoint_of_another_shape_is_refused_and_the_old_weights_serve_on(
    api: Api, server: Server, models: Models, reference: Reference
) -> None:
    status, _ = await api.post("/update_weights_from_disk", model_path=str(models.wide), weight_version="v7")
    if server.name == "fake":
        assert (status, await api.version()) == (200, "v7")
        return
    assert status == 400
    await assert_still_v0(api, reference)


async def test_checkpoint_with_nan_is_refused_and_the_old_weights_serve_on(
    api: Api, server: Server, models: Models, reference: Reference
) -> None:
    status, body = await api.post("/update_weights_from_disk", model_path=str(models.nan), weight_version="v7")
    if server.name == "sglang":
        output = await api.generate(PROMPT, 3)
        assert (status, output.ids, output.logprobs) == (200, [0, 0, 0], [None, None, None])
        return
    if server.name == "fake":
        assert (status, await api.version()) == (200, "v7")
        return
    assert status == 400
    assert "model.norm.weight" in body["message"]
    await assert_still_v0(api, reference)


async def test_digest_of_the_weights_is_reported_and_a_wrong_one_refused(
    api: Api, server: Server, models: Models, reference: Reference
) -> None:
    from agentrl.weights.digest import weights_digest

    _, info = await api.get("/model_info")
    status, _ = await update(api, models, "v1", expected_digest=weights_digest(models.a))
    if server.name != "embedded":
        assert ("weights_digest" in info, status) == (False, 200)
        return
    assert (info["weights_digest"], status) == (weights_digest(models.a), 400)
    await assert_still_v0(api, reference)
    assert (await update(api, models, "v1", expected_digest=weights_digest(models.b)))[0] == 200
    assert (await api.get("/model_info"))[1]["weights_digest"] == weights_digest(models.b)


async def assert_still_v0(api: Api, reference: Reference) -> None:
    assert await api.version() == "v0"
    output = await api.generate(PROMPT, 8)
    assert output.spans == [("v0", 0, 8)]
    assert_close(output.logprobs, reference.logprobs("v0", PROMPT, output.ids))
