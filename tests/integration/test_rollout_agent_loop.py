"""Whole rollouts: real tokenizer, template, tools and scorer; the model's words are scripted."""

import copy
import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from rollout_kit import Say, ScriptedGenerator

from agentrl.errors import (
    ConfigError,
    DeadlineExceeded,
    GenerationError,
    RewardError,
    RolloutError,
)
from agentrl.rollout.agent_loop import Limits, Rollout, RolloutState, agent_loop, get_agent_loop, run_rollout
from agentrl.rollout.chat_template import ChatTemplate
from agentrl.rollout.reward import Scorer
from agentrl.rollout.tool_loading import load_tools
from agentrl.rollout.toolbox import Toolbox
from agentrl.supervise import current_waits
from agentrl.testing.tiny_model import make_tiny_tokenizer
from agentrl.types import Episode, SamplingParams, Score, Stop, Task

TASK = Task(id="t/1", prompt=[{"role": "user", "content": "What is 3 + 4?"}], data_source="sums", ground_truth="7")
SAMPLING = SamplingParams(max_new_tokens=512)
TOKENIZER = make_tiny_tokenizer()


def toolbox(**entry: Any) -> Toolbox:
    return load_tools([{"use": "rollout_kit:calculator", **entry}], tokenizer=TOKENIZER)


def call(expression: str) -> str:
    return "<tool_call>\n" + json.dumps({"name": "calculator", "arguments": {"expression": expression}}) + "\n</tool_call>"


def solved(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    return float(solution_str.endswith(f"#### {ground_truth}"))


async def play(
    *turns: Say | str,
    limits: Limits | None = None,
    tools: Toolbox | None = None,
    scorer: Scorer | None = None,
    task: Task = TASK,
    loop: str = "tool_agent",
    tokenizer: Any = TOKENIZER,
    **more: Any,
) -> tuple[Rollout, ScriptedGenerator]:
    generator = ScriptedGenerator(tokenizer, [t if isinstance(t, Say) else Say(t) for t in turns])
    box = toolbox() if tools is None else tools
    rollout = await run_rollout(
        task,
        loop=loop,
        template=ChatTemplate(tokenizer, tools=box.schemas() or None),
        generator=generator,
        toolbox=box,
        scorer=scorer or Scorer(fn=solved),
        limits=limits or Limits(),
        sampling=SAMPLING,
        trajectory_id="t/1/5/2/0",
        group_id="t/1/5",
        ordinal=5,
        sample_index=2,
        attempt=0,
        env_name="sums",
        **more,
    )
    return rollout, generator


def assert_tokens_are_what_was_sampled(rollout: Rollout, generator: ScriptedGenerator) -> None:
    (segment,) = rollout.trajectory.segments
    sampled = [g for gs in generator.generations.values() for g in gs]
    assert segment.ids[segment.mask].tolist() == [i for g in sampled for i in g.ids]
    expected = np.asarray([x for g in sampled for x in g.logprobs], dtype=np.float32)
    assert segment.logprobs[segment.mask].tolist() == expected.tolist()
    assert segment.versions[segment.mask].tolist() == [v for g in sampled for v in g.versions]
    assert (segment.logprobs[~segment.mask] == 0).all()
    assert (segment.versions[~segment.mask] == -1).all()
    shown = [ids for _, ids, _ in generator.requests]
    for ids in shown:  # each request extends the last, and the trajectory extends them all
        assert segment.ids[: len(ids)].tolist() == ids


@pytest.mark.asyncio
async def test_a_rollout_with_a_tool_is_the_template_rendering_and_nothing_was_re_encoded() -> None:
    (rollout, generator) = await play(Say(call("3+4"), version=3), Say("#### 7", version=4))
    trajectory, episode = rollout
    assert_tokens_are_what_was_sampled(rollout, generator)
    text = TOKENIZER.decode(trajectory.segments[0].ids.tolist())
    messages = [
        *TASK.prompt,
        {"role": "assistant", "content": call("3+4")},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "#### 7"},
    ]
    whole = TOKENIZER.apply_chat_template(messages, tools=toolbox().schemas(), tokenize=False)
    assert whole == text + "\n"  # the last turn ends with its end-of-turn token
    assert (trajectory.stop, trajectory.reward, dict(trajectory.reward_terms)) == ("answered", 1.0, {"correct": 1.0})
    assert (trajectory.id, trajectory.group_id, trajectory.ordinal, trajectory.sample_index) == ("t/1/5/2/0", "t/1/5", 5, 2)
    assert (trajectory.min_version, trajectory.max_version) == (3, 4)
    assert [(t.kind, t.ok, t.name, t.text) for t in trajectory.turns] == [
        ("model", True, "", call("3+4")),
        ("tool", True, "calculator", "7"),
        ("model", True, "", "#### 7"),
    ]
    first, observed, last = trajectory.turns
    assert (first.start, first.end, last.start) == (trajectory.segments[0].prompt_length, observed.start, observed.end)
    assert last.end == len(trajectory.segments[0].ids)
    assert (episode.assistant_text, episode.final, episode.num_turns) == (f"{call('3+4')}\n#### 7", "#### 7", 2)
    assert "<tool_response>\n7\n</tool_response>" in episode.transcript
    assert [(c.name, dict(c.arguments), c.result) for c in episode.calls] == [("calculator", {"expression": "3+4"}, "7")]


@pytest.mark.asyncio
async def test_text_of_a_tool_earns_nothing_unless_the_transcript_is_asked_for() -> None:
    def mentions(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
        return float("99" in solution_str)

    turns = (call("50+49"), "done")
    (assistant, _) = await play(*turns, scorer=Scorer(fn=mentions))
    (transcript, _) = await play(*turns, scorer=Scorer(fn=mentions, solution="transcript"))
    assert (assistant.trajectory.reward, transcript.trajectory.reward) == (0.0, 1.0)


@pytest.mark.asyncio
async def test_several_calls_in_a_turn_are_answered_together() -> None:
    (rollout, generator) = await play(call("1+1") + call("x") + "<tool_call>{'", "#### 7")
    assert [(c.ok, c.error_kind) for c in rollout.episode.calls] == [(True, ""), (False, "tool"), (False, "parse")]
    text = TOKENIZER.decode(generator.requests[1][1])
    assert text.count("<tool_response>") == 3
    assert "cannot compute 'x'" in text
    assert_tokens_are_what_was_sampled(rollout, generator)


@pytest.mark.asyncio
async def test_surplus_calls_are_answered_once_with_the_limit() -> None:
    (rollout, generator) = await play(call("1+1") * 5, "#### 7", limits=Limits(max_calls_per_turn=2))
    assert [c.error_kind for c in rollout.episode.calls] == ["", "", "limit"]
    assert "3 further calls were not run; at most 2 per turn" in TOKENIZER.decode(generator.requests[1][1])


@pytest.mark.asyncio
async def test_a_turn_cut_by_its_own_limit_goes_on_with_its_end_as_observation() -> None:
    limits = Limits(max_tokens_per_turn=12, max_tokens=400)
    (rollout, generator) = await play(call("1+" * 30), "#### 7", limits=limits)
    segment = rollout.trajectory.segments[0]
    cut = segment.prompt_length + 12
    assert segment.mask[segment.prompt_length : cut].all()
    assert (segment.ids[cut], segment.mask[cut]) == (TOKENIZER.eos_token_id, False)
    assert "cut off by the token limit" in TOKENIZER.decode(generator.requests[1][1])
    assert rollout.trajectory.stop == "answered"
    assert_tokens_are_what_was_sampled(rollout, generator)


@pytest.mark.asyncio
async def test_a_cut_turn_without_calls_ends_by_tokens_and_is_scored() -> None:
    (rollout, _) = await play("word " * 50, limits=Limits(max_tokens_per_turn=8))
    assert (rollout.trajectory.stop, rollout.trajectory.reward) == ("max_tokens", 0.0)


@pytest.mark.asyncio
async def test_the_response_budget_counts_observations_and_is_never_exceeded() -> None:
    used = len(TOKENIZER.encode(call("1+1"))) + 1
    for spare, stop in ((1, "max_tokens"), (60, "max_turns")):
        limits = Limits(max_tokens=used + spare, max_turns=2)
        (rollout, generator) = await play(call("1+1"), call("1+1"), limits=limits)
        segment = rollout.trajectory.segments[0]
        assert len(segment.ids) - segment.prompt_length <= limits.max_tokens
        assert rollout.trajectory.stop == stop
        assert_tokens_are_what_was_sampled(rollout, generator)
    (rollout, generator) = await play("a" * 400, limits=Limits(max_tokens=5))
    assert generator.requests[0][2].max_new_tokens == 5
    assert rollout.trajectory.stop == "max_tokens"


@pytest.mark.asyncio
async def test_calls_of_the_last_turn_are_not_run() -> None:
    (rollout, _) = await play(call("1+1"), call("2+2"), limits=Limits(max_turns=2))
    assert rollout.trajectory.stop == "max_turns"
    assert [c.result for c in rollout.episode.calls] == ["2"]
    assert rollout.episode.final == call("2+2")


@pytest.mark.asyncio
async def test_too_many_invalid_calls_end_the_rollout() -> None:
    bad = "<tool_call>\n{'name'}\n</tool_call>"
    (rollout, generator) = await play(bad, bad, bad, limits=Limits(max_invalid_calls=2))
    assert rollout.trajectory.stop == "tool_limit"
    assert rollout.episode.num_turns == 2
    assert_tokens_are_what_was_sampled(rollout, generator)


@pytest.mark.asyncio
async def test_the_rollouts_deadline_ends_it_scored_on_what_was_written() -> None:
    limits = Limits(rollout_timeout_s=200)
    (slow_model, generator) = await play(call("3+4"), Say("#### 7", passes=200), limits=limits)
    assert (slow_model.trajectory.stop, slow_model.episode.num_turns, slow_model.trajectory.reward) == ("deadline", 1, 0.0)
    (slow_tool, _) = await play(call("sleep"), limits=limits, tools=toolbox(timeout_s=1000))
    assert (slow_tool.trajectory.stop, slow_tool.episode.calls) == ("deadline", ())
    with pytest.raises(DeadlineExceeded) as caught:  # nothing was sampled: nothing to train on
        await play(Say("x", passes=200), limits=limits)
    assert_tokens_are_what_was_sampled(slow_model, generator)
    assert isinstance(caught.value.partial, Rollout)
    assert current_waits() == {}


@pytest.mark.asyncio
@pytest.mark.parametrize(("limit_s", "silent_s", "is_stall"), [(200, 9, False), (200, 11, True), (4, 1, False), (4, 3, True)])
async def test_a_deadline_that_a_stalled_server_used_up_is_not_scored(limit_s: int, silent_s: int, is_stall: bool) -> None:
    late = DeadlineExceeded("generation (waiting for server)", limit_s, silent_s=silent_s)
    playing = play(call("3+4"), Say("", passes=limit_s, error=late), limits=Limits(rollout_timeout_s=limit_s))
    if not is_stall:
        (rollout, _) = await playing
        assert (rollout.trajectory.stop, rollout.episode.num_turns) == ("deadline", 1)
        return
    with pytest.raises(DeadlineExceeded) as caught:
        await playing
    partial = caught.value.partial
    assert isinstance(partial, Rollout)
    assert (partial.trajectory.stop, partial.trajectory.reward, partial.episode.num_turns) == ("error:deadline", 0.0, 1)


@pytest.mark.asyncio
async def test_a_turns_deadline_is_an_infrastructure_failure() -> None:
    with pytest.raises(DeadlineExceeded, match="turn did not finish") as caught:
        await play(call("3+4"), Say("#### 7", passes=101), limits=Limits(turn_timeout_s=100))
    partial = caught.value.partial
    assert isinstance(partial, Rollout)
    assert (partial.trajectory.stop, partial.trajectory.reward, partial.episode.num_turns) == ("error:deadline", 0.0, 1)


@pytest.mark.asyncio
async def test_a_tools_timeout_is_the_models_to_read() -> None:
    (rollout, generator) = await play(call("sleep"), "#### 7", tools=toolbox(timeout_s=100))
    assert (rollout.trajectory.stop, rollout.episode.calls[0].error_kind) == ("answered", "timeout")
    assert "did not finish within 100 s" in TOKENIZER.decode(generator.requests[1][1])


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("turn", "kind", "stop"),
    [
        (Say(call("fail")), "sandbox", "error:sandbox"),
        (Say("x", error=GenerationError("no server")), "generation", "error:generation"),
        (Say("x", finish="abort"), "aborted", "aborted"),
        (Say("x y z", change={"logprobs": [-1.0]}), "generation", "error:generation"),
        (Say("x", change={"logprobs": [float("nan")] * 2}), "generation", "error:generation"),
        (Say("x", version=-1), "generation", "error:generation"),
        (Say("x", change={"ids": [], "logprobs": [], "versions": []}), "generation", "error:generation"),
    ],
)
async def test_what_the_model_did_not_cause_is_a_failure_with_its_record(turn: Say, kind: str, stop: str) -> None:
    with pytest.raises(RolloutError) as caught:
        await play(call("1+1"), turn)
    partial = caught.value.partial
    assert caught.value.kind == kind
    assert isinstance(partial, Rollout)
    assert (partial.trajectory.stop, partial.trajectory.reward) == (stop, 0.0)
    assert partial.episode.num_turns == (2 if kind == "sandbox" else 1)


@pytest.mark.asyncio
async def test_a_scorer_that_raises_fails_the_rollout_and_keeps_it_for_replay() -> None:
    def broken(**_: Any) -> float:
        raise ZeroDivisionError("division by zero")

    with pytest.raises(RewardError, match="broken raised ZeroDivisionError on task t/1: division by zero") as caught:
        await play("#### 7", scorer=Scorer(fn=broken))
    partial = caught.value.partial
    assert isinstance(partial, Rollout)
    assert (partial.trajectory.stop, partial.episode.assistant_text) == ("error:reward", "#### 7")


@pytest.mark.asyncio
async def test_step_rewards_of_tools_become_a_named_term_when_they_have_weight() -> None:
    class Two:
        async def score(self, episode: Episode) -> Score:
            return Score(correct=1.0, terms={"format": 0.5})

    box = load_tools(["rollout_kit:rewarding"])
    text = '<tool_call>\n{"name": "rewarding", "arguments": {}}\n</tool_call>'
    (rollout, _) = await play(text + text, "ok", tools=box, scorer=Scorer(env=Two(), tool_reward_weight=0.1))  # type: ignore[arg-type]
    assert dict(rollout.trajectory.reward_terms) == {"correct": 1.0, "format": 0.5, "tool": pytest.approx(0.6)}
    assert rollout.trajectory.reward == pytest.approx(2.1)


@pytest.mark.asyncio
async def test_a_single_turn_shows_and_calls_no_tools() -> None:
    (rollout, generator) = await play(call("1+1"), loop="single_turn")
    assert (rollout.trajectory.stop, rollout.episode.calls) == ("answered", ())
    assert "calculator" not in TOKENIZER.decode(generator.requests[0][1])


@pytest.mark.asyncio
async def test_a_rows_tool_selection_narrows_what_is_shown_and_runnable() -> None:
    task = dataclasses.replace(TASK, tool_selection=[])
    (rollout, generator) = await play(call("1+1"), task=task)
    assert (rollout.trajectory.stop, rollout.episode.calls) == ("answered", ())
    assert "calculator" not in TOKENIZER.decode(generator.requests[0][1])


@pytest.mark.asyncio
async def test_stop_tokens_of_the_template_are_asked_for_even_where_the_engine_knows_others() -> None:
    other = copy.deepcopy(TOKENIZER)  # a shallow one shares the map of special tokens
    other.eos_token = "<|endoftext|>"
    (_, generator) = await play("#### 7", tokenizer=other)
    assert generator.requests[0][2].stop_token_ids == (2, 0)


@pytest.mark.asyncio
async def test_versions_are_not_required_where_a_foreign_server_is_evaluated() -> None:
    (rollout, _) = await play(Say("#### 7", version=-1), require_versions=False)
    assert rollout.trajectory.reward == 1.0


@pytest.mark.asyncio
async def test_loops_are_a_registry() -> None:
    @agent_loop("twice")
    async def twice(state: RolloutState) -> Stop:
        await state.generate()
        state.builder.append_observed(state.template.observation_ids([{"role": "user", "content": "Sure?"}], last_sampled=2))
        await state.generate()
        return "answered"

    (rollout, generator) = await play("7", "#### 7", loop="twice")
    assert rollout.episode.num_turns == 2
    assert_tokens_are_what_was_sampled(rollout, generator)
    assert get_agent_loop("single_turn_agent") is get_agent_loop("single_turn")
    with pytest.raises(ConfigError, match="no agent loop `tool_agnt`; there are: env, proxy, single_turn, tool_agent"):
        get_agent_loop("tool_agnt")
