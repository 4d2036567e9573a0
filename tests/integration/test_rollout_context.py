"""Long contexts go on in a new segment: token-exact, each sampled token once, as the template would print it."""

import numpy as np
import pytest
from rollout_kit import Say
from test_rollout_agent_loop import TOKENIZER, call, play

from agentrl.config import Config
from agentrl.learner.batching import BatchRow
from agentrl.learner.credit import compact_rewards
from agentrl.rollout.agent_loop import Limits, Rollout, RolloutState, agent_loop
from agentrl.rollout.context import NOTE, ContextPolicy, ResultSpan, drop_oldest_results
from agentrl.stream.codec import decode, encode
from agentrl.types import Stop


def text_of(rollout: Rollout, segment: int) -> str:
    return TOKENIZER.decode(rollout.trajectory.segments[segment].ids.tolist())


def assert_each_sampled_token_once(rollout: Rollout, generator: object) -> None:
    """In order over the segments, and each behind exactly what the engine was shown."""
    sampled = [g for gs in generator.generations.values() for g in gs]  # type: ignore[attr-defined]
    segments = rollout.trajectory.segments
    assert [i for s in segments for i in s.ids[s.mask].tolist()] == [i for g in sampled for i in g.ids]
    shown = [ids for _, ids, _ in generator.requests]  # type: ignore[attr-defined]
    turns = [t for t in rollout.trajectory.turns if t.kind == "model"]
    for ids, turn in zip(shown, turns, strict=True):
        assert segments[turn.segment].ids[: turn.start].tolist() == ids


@pytest.mark.asyncio
async def test_the_oldest_results_are_dropped_and_the_new_context_is_what_the_template_prints() -> None:
    long = "+".join(["1"] * 30)
    policy = ContextPolicy(at_tokens=330, to_tokens=300, keep=1)
    turns = [call(f"{n}+{long}") for n in (1, 2, 3)]
    tools_say = [31, 32, 33]
    rollout, generator = await play(*turns, "#### 7", limits=Limits(context=policy, max_tokens=4000))
    # A result here is shorter than the note, so nothing can be dropped: one segment.
    assert len(rollout.trajectory.segments) == 1
    assert tools_say == [int(c.result) for c in rollout.episode.calls]

    # The tool repeats what it cannot compute, so its result is as long as the call.
    words = " ".join(["word"] * 60)
    prompt = len(generator.requests[0][1])
    turns = [call(f"{n} {words}") for n in (1, 2, 3)]
    policy = ContextPolicy(at_tokens=prompt + 330, to_tokens=prompt + 320, keep=1)
    rollout, generator = await play(*turns, "#### 7", limits=Limits(context=policy, max_tokens=4000))
    assert_each_sampled_token_once(rollout, generator)
    assert len(rollout.trajectory.segments) >= 2
    results = [c.result for c in rollout.episode.calls]
    last = len(rollout.trajectory.segments) - 1
    note = next(t for t in rollout.trajectory.turns if t.name == "context")
    assert (note.segment, note.start, note.end) == (1, 0, rollout.trajectory.segments[1].prompt_length)
    assert note.text.startswith("dropped 1 tool results")
    kept = text_of(rollout, last)
    messages = [{"role": "user", "content": "What is 3 + 4?"}]
    for turn, result in zip(turns, results, strict=True):
        messages += [{"role": "assistant", "content": turn}, {"role": "tool", "content": result if result in kept else NOTE}]
    messages.append({"role": "assistant", "content": "#### 7"})
    assert NOTE in kept
    assert results[-1] in kept
    from test_rollout_agent_loop import toolbox

    whole = TOKENIZER.apply_chat_template(messages, tools=toolbox().schemas(), tokenize=False)
    assert whole == kept + "\n"
    assert decode(encode(rollout.trajectory)).segments[1].prompt_length == note.end  # type: ignore[union-attr]


@pytest.mark.asyncio
async def test_a_loop_may_go_on_from_a_summary_and_the_reward_is_shared() -> None:
    @agent_loop("with_summary")
    async def summarising(state: RolloutState) -> Stop:
        first = await state.generate()
        state.reward_turn(0.25)
        state.new_segment([*state.task.prompt, {"role": "user", "content": f"So far: {first.text}"}], why="summary")
        await state.generate()
        return "answered"

    rollout, generator = await play(Say("hm", version=2), Say("#### 7", version=3), loop="with_summary")
    assert_each_sampled_token_once(rollout, generator)
    first, second = rollout.trajectory.segments
    assert "So far: hm" in TOKENIZER.decode(second.ids[: second.prompt_length].tolist())
    assert (first.versions.max(), second.versions.max()) == (2, 3)
    assert "So far" not in rollout.episode.transcript
    assert rollout.episode.texts == ("hm", "#### 7")
    assert dict(rollout.trajectory.reward_terms) == {"correct": 1.0, "turns": 0.25}
    rewards, mask = compact_rewards(
        [BatchRow(trajectory=rollout.trajectory, group=0, staleness=0, is_trained=True)], use_turn_rewards=True
    )
    assert int(mask.sum()) == rollout.trajectory.num_sampled
    placed = rewards[0].numpy()
    end_of_first = int(first.mask.sum()) - 1
    assert placed[end_of_first] == np.float32(0.25)
    assert placed[-1] == np.float32(1.0)
    assert placed.sum() == np.float32(1.25)


def test_the_policy_drops_no_more_than_it_must_and_never_the_latest() -> None:
    ids = [0, 1, *[9] * 10, 2, *[9] * 10, 3, *[9] * 10, 4]
    spans = [ResultSpan(2, 12, 1), ResultSpan(13, 23, 1), ResultSpan(24, 34, 2)]

    def notes(count: int, last: int) -> list[int]:
        return [100 + last] * count

    assert drop_oldest_results(ids, spans, ContextPolicy(at_tokens=35, to_tokens=10), notes) is None  # not too long
    one = drop_oldest_results(ids, spans, ContextPolicy(at_tokens=30, to_tokens=30), notes)
    assert one is not None
    assert one.ids == [0, 1, 101, 2, *[9] * 10, 3, *[9] * 10, 4]
    assert one.spans == [ResultSpan(2, 3, 1, True), ResultSpan(4, 14, 1), ResultSpan(15, 25, 2)]
    both = drop_oldest_results(ids, spans, ContextPolicy(at_tokens=30, to_tokens=1), notes)
    assert both is not None
    assert (both.num_dropped, both.ids) == (2, [0, 1, 101, 2, 102, 3, *[9] * 10, 4])
    again = drop_oldest_results(both.ids, both.spans, ContextPolicy(at_tokens=5, to_tokens=1), notes)
    assert again is None  # what is left is kept, so there is no segment without a gain
    every = drop_oldest_results(ids, spans, ContextPolicy(at_tokens=30, to_tokens=1, keep=0), notes)
    assert every is not None
    assert (every.num_dropped, every.ids[-3:]) == (4, [103, 103, 4])
    with pytest.raises(ValueError, match="to_tokens <= at_tokens"):
        ContextPolicy(at_tokens=5, to_tokens=6)
    with pytest.raises(ValueError, match=r"serve.context.to_tokens=9 exceeds at_tokens=5"):
        Config.model_validate({"serve": {"context": {"at_tokens": 5, "to_tokens": 9}}})
