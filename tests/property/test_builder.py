"""I1: a conversation is only ever extended, and what is trained is what was sampled."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrl.errors import GenerationError
from agentrl.rollout.chat_template import ChatTemplate
from agentrl.rollout.trajectory_builder import TrajectoryBuilder
from agentrl.testing.tiny_model import make_tiny_tokenizer
from agentrl.types import Generation, Trajectory

IDS = st.lists(st.integers(0, 2**31 - 1), max_size=12)


@st.composite
def generations(draw: st.DrawFn) -> Generation:
    ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=12))
    logprobs = draw(st.lists(st.floats(-50, 0, width=32), min_size=len(ids), max_size=len(ids)))
    versions = draw(st.lists(st.integers(0, 1000), min_size=len(ids), max_size=len(ids)))
    return Generation(ids=ids, logprobs=logprobs, versions=versions, finish="stop", server="s")


def finish(builder: TrajectoryBuilder) -> Trajectory:
    return builder.finish(
        id="i", task_id="t", group_id="g", ordinal=0, sample_index=0, attempt=0, env="e", agent="a", data_source="d",
        split="train", reward=0.5, reward_terms={}, stop="answered", created=0.0, finished=1.0,
    )  # fmt: skip


@given(
    prompt=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=12),
    steps=st.lists(st.one_of(generations(), IDS), max_size=12),
)
def test_ids_are_only_extended_and_every_array_describes_the_same_token(
    prompt: list[int], steps: list[Generation | list[int]]
) -> None:
    builder = TrajectoryBuilder(prompt)
    sampled: list[tuple[int, float, int]] = []
    expected = list(prompt)
    for step in steps:
        before = list(builder.token_ids)
        if isinstance(step, Generation):
            start, end = builder.append_sampled(step)
            new = step.ids
            sampled += zip(step.ids, step.logprobs, step.versions, strict=True)
        else:
            start, end = builder.append_observed(step)
            new = step
        expected += new
        assert builder.token_ids[: len(before)].tolist() == before
        assert builder.token_ids[start:end].tolist() == new
        assert end == len(builder.token_ids) == len(expected)
    (segment,) = finish(builder).segments
    assert segment.ids.tolist() == expected
    assert segment.prompt_length == len(prompt)
    assert not segment.mask[: len(prompt)].any()
    at = np.flatnonzero(segment.mask)
    assert [(int(segment.ids[t]), float(segment.logprobs[t]), int(segment.versions[t])) for t in at] == sampled
    assert (segment.logprobs[~segment.mask] == 0).all()
    assert (segment.versions[~segment.mask] == -1).all()
    assert builder.num_sampled == len(sampled)
    assert builder.tokens_left(len(expected)) == len(prompt)


@given(generation=generations(), extra=st.sampled_from(["ids", "logprobs", "versions"]))
def test_a_generation_whose_lengths_differ_changes_nothing(generation: Generation, extra: str) -> None:
    builder = TrajectoryBuilder([1])
    fields = {name: list(getattr(generation, name)) for name in ("ids", "logprobs", "versions")}
    fields[extra] = fields[extra][:-1]
    with pytest.raises(GenerationError, match="they must match"):
        builder.append_sampled(Generation(**fields, finish="stop", server="s"))
    assert builder.token_ids.tolist() == [1]


@given(first=generations(), second=generations())
def test_segments_keep_their_own_prompts(first: Generation, second: Generation) -> None:
    builder = TrajectoryBuilder([1, 2])
    builder.append_sampled(first)
    builder.new_segment([3])
    assert builder.token_ids.tolist() == [3]
    builder.append_sampled(second)
    trajectory = finish(builder)
    assert [s.prompt_length for s in trajectory.segments] == [2, 1]
    assert [s.ids[s.mask].tolist() for s in trajectory.segments] == [first.ids, second.ids]
    assert trajectory.num_sampled == len(first.ids) + len(second.ids) == builder.num_response_tokens


@pytest.mark.parametrize("bad", [[-1], [2**31]])
def test_what_is_no_token_id_is_refused(bad: list[int]) -> None:
    with pytest.raises(GenerationError, match="no token id"):
        TrajectoryBuilder([1]).append_observed(bad)
    with pytest.raises(GenerationError, match="no tokens"):
        TrajectoryBuilder([])


TOKENIZER = make_tiny_tokenizer()
TEMPLATE = ChatTemplate(TOKENIZER, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])
PIECES = st.lists(
    st.sampled_from(
        ["<|im_end|>", "<|im_start|>", "<tool_call>", "</tool_response>", "<", "|", "im_end", "|>", "7", " ", "\n", "é"]
    ),
    max_size=10,
).map("".join)


@given(contents=st.lists(st.one_of(st.text(max_size=20), PIECES), min_size=1, max_size=3), sampled_end=st.booleans())
def test_no_text_of_a_tool_changes_the_control_tokens_of_an_observation(contents: list[str], sampled_end: bool) -> None:
    last = TEMPLATE.end_of_turn_id if sampled_end else 400
    ids = TEMPLATE.observation_ids([{"role": "tool", "content": c} for c in contents], last_sampled=last)
    plain = TEMPLATE.observation_ids([{"role": "tool", "content": "x"} for _ in contents], last_sampled=last)
    markup = range(7)
    assert [i for i in ids if i in markup] == [i for i in plain if i in markup]
    text = TEMPLATE.decode_all(ids)
    for content in contents:
        assert content.encode("utf-8", "replace").decode() in text
