"""The OpenAI-compatible endpoint under the unmodified ``openai`` SDK: real HTTP, real tokenizer; the model's words are scripted."""

import asyncio
import json
from typing import Any

import httpx
import numpy as np
import pytest
from proxy_kit import Agent, Inline
from rollout_kit import Say, ScriptedGenerator

from agentrl.errors import GenerationError
from agentrl.rollout.agent_loop import Limits, Rollout, run_rollout
from agentrl.rollout.chat_template import ChatTemplate
from agentrl.rollout.proxy.agent_process import AgentCommand
from agentrl.rollout.proxy.host import ProxyHost, proxy_host
from agentrl.rollout.proxy.session import Session
from agentrl.rollout.reward import Scorer
from agentrl.rollout.toolbox import Toolbox
from agentrl.stream.codec import decode, encode
from agentrl.testing.clock import pass_time
from agentrl.testing.tiny_model import make_tiny_tokenizer
from agentrl.types import SamplingParams, Task

openai = pytest.importorskip("openai")

TOKENIZER = make_tiny_tokenizer()
TASK = Task(id="t/1", prompt=[{"role": "user", "content": "What is 3 + 4?"}], data_source="sums", ground_truth="7")
QUESTION: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 3 + 4?"}]
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
        },
    }
]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 3}}\n</tool_call>'


async def play(
    agent: Agent,
    *turns: Say | str,
    host: ProxyHost | None = None,
    script: Any = None,
    generator: ScriptedGenerator | None = None,
    **limits: Any,
) -> tuple[Rollout, ScriptedGenerator]:
    generator = generator or ScriptedGenerator(TOKENIZER, script or [t if isinstance(t, Say) else Say(t) for t in turns])
    async with proxy_host(host or ProxyHost(AgentCommand(argv=["true"]))) as running:
        rollout = await run_rollout(
            TASK, loop="proxy", template=ChatTemplate(TOKENIZER, tools=None), generator=generator, toolbox=Toolbox(),
            scorer=Scorer(fn=lambda solution_str, ground_truth, **_: float(solution_str.endswith(ground_truth))),
            limits=Limits(**limits), sampling=SamplingParams(max_new_tokens=512, temperature=0.7), trajectory_id="t/1/0/0/0",
            group_id="t/1/0", ordinal=0, sample_index=0, attempt=0, env_name="e", host=Inline(running, agent),
        )  # fmt: skip
    return rollout, generator


def assert_exact(rollout: Rollout, generator: ScriptedGenerator) -> None:
    """Every sampled token is trained once, as it was sampled, behind exactly what the engine was shown."""
    segments = rollout.trajectory.segments
    recorded: list[tuple[list[int], list[int], list[float]]] = []
    for segment in segments:
        edges = np.flatnonzero(np.diff(segment.mask.astype(np.int8), prepend=0, append=0))
        ids = segment.ids.tolist()
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            recorded.append((ids[:start], ids[start:end], segment.logprobs[start:end].tolist()))
    sampled = [
        (shown, g.ids, [float(np.float32(x)) for x in g.logprobs])
        for (_, shown, _), g in zip(generator.requests, generator.generations["t/1/0/0/0"], strict=True)
    ]
    assert sorted(recorded) == sorted(sampled)
    assert rollout.trajectory.num_sampled == sum(len(g.ids) for g in generator.generations["t/1/0/0/0"])
    decoded = decode(encode(rollout.trajectory))
    assert len(decoded.segments) == len(segments)  # type: ignore[union-attr]


async def ask(client: Any, messages: list[Any], **more: Any) -> Any:
    return await client.chat.completions.create(model="policy", messages=messages, **more)


@pytest.mark.asyncio
async def test_a_conversation_that_is_extended_is_one_segment_and_the_templates_rendering() -> None:
    async def agent(client: Any, session: Session) -> None:
        first = await ask(client, QUESTION, tools=TOOLS)
        choice = first.choices[0]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        (call,) = choice.message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 3})
        said = choice.message.model_dump()  # with every null field, as agents send it back
        result = {"role": "tool", "tool_call_id": call.id, "content": "7"}
        second = await ask(client, [*QUESTION, said, result], tools=TOOLS)
        assert second.choices[0].message.content == "It is 7"
        assert second.usage.prompt_tokens > first.usage.prompt_tokens
        again = [*QUESTION, said, result, {"role": "assistant", "content": [{"type": "text", "text": "It is 7 "}]}]
        third = await ask(client, [*again, {"role": "user", "content": "Sure?"}], tools=TOOLS)
        assert third.choices[0].message.content == "7"

    rollout, generator = await play(agent, Say(CALL, version=1), "It is 7", Say("7", version=5))
    assert_exact(rollout, generator)
    (segment,) = rollout.trajectory.segments
    messages = [
        *QUESTION,
        {"role": "assistant", "content": CALL},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "It is 7"},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "7"},
    ]
    assert TOKENIZER.apply_chat_template(messages, tools=TOOLS, tokenize=False) == TOKENIZER.decode(segment.ids.tolist()) + "\n"
    assert [(t.kind, t.name, t.text) for t in rollout.trajectory.turns] == [
        ("model", "", CALL), ("tool", "add", "7"), ("model", "", "It is 7"), ("env", "", "Sure?"), ("model", "", "7"),
    ]  # fmt: skip
    assert (rollout.trajectory.min_version, rollout.trajectory.max_version) == (1, 5)
    assert [(c.name, dict(c.arguments), c.result) for c in rollout.episode.calls] == [("add", {"a": 3}, "7")]
    assert (rollout.episode.final, rollout.trajectory.reward) == ("It is 7\n7", 1.0)


@pytest.mark.asyncio
async def test_a_streamed_answer_is_the_same_answer() -> None:
    async def agent(client: Any, session: Session) -> None:
        stream = await ask(client, QUESTION, tools=TOOLS, stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
        arguments = "".join(c.function.arguments or "" for k in chunks if k.choices for c in k.choices[0].delta.tool_calls or ())
        assert json.loads(arguments) == {"a": 3}
        assert [k.choices[0].finish_reason for k in chunks if k.choices and k.choices[0].finish_reason] == ["tool_calls"]
        assert chunks[-1].usage.completion_tokens == len(TOKENIZER.encode(CALL)) + 1
        opening = next(k.choices[0].delta.tool_calls[0] for k in chunks if k.choices and k.choices[0].delta.tool_calls)
        call = {"id": opening.id, "type": "function", "function": {"name": opening.function.name, "arguments": arguments}}
        said = {"role": "assistant", "content": None, "tool_calls": [call]}
        messages = [*QUESTION, said, {"role": "tool", "tool_call_id": opening.id, "content": "7"}]
        stream = await ask(client, messages, tools=TOOLS, stream=True)
        text = "".join([k.choices[0].delta.content or "" async for k in stream])
        assert text == "a long answer, so that it comes in several pieces: 7"

    rollout, generator = await play(agent, CALL, "a long answer, so that it comes in several pieces: 7")
    assert_exact(rollout, generator)
    assert len(rollout.trajectory.segments) == 1


@pytest.mark.asyncio
async def test_a_rewritten_history_is_a_new_segment_and_nothing_is_trained_twice() -> None:
    async def agent(client: Any, session: Session) -> None:
        first = (await ask(client, QUESTION)).choices[0].message
        long = [*QUESTION, {"role": "assistant", "content": first.content}, {"role": "user", "content": "More."}]
        await ask(client, long)
        summary = [QUESTION[0], {"role": "user", "content": "So far: one and two. Go on."}]
        third = (await ask(client, summary)).choices[0].message
        await ask(client, [*summary, {"role": "assistant", "content": third.content}, {"role": "user", "content": "End."}])
        changed = [*QUESTION, {"role": "assistant", "content": "ONE"}, {"role": "user", "content": "More."}]
        await ask(client, changed)
        assert session.branches == 2

    rollout, generator = await play(agent, "one", "two", "three", "four", "7")
    assert_exact(rollout, generator)
    first, second, third = rollout.trajectory.segments
    assert [TOKENIZER.decode(s.ids[s.mask].tolist()) for s in (first, second, third)] == [
        "one<|im_end|>two<|im_end|>", "three<|im_end|>four<|im_end|>", "7<|im_end|>",
    ]  # fmt: skip
    assert "ONE" in TOKENIZER.decode(third.ids[: third.prompt_length].tolist())


@pytest.mark.asyncio
async def test_several_choices_and_a_repeated_question_each_are_branches_of_the_same_ids() -> None:
    async def agent(client: Any, session: Session) -> None:
        many = await ask(client, QUESTION, n=3)
        assert sorted(c.message.content for c in many.choices) == ["a", "b", "c"]
        assert [c.index for c in many.choices] == [0, 1, 2]
        picked = {"role": "assistant", "content": "b"}
        await ask(client, [*QUESTION, picked, {"role": "user", "content": "Why?"}])
        await ask(client, [*QUESTION, picked, {"role": "user", "content": "Why?"}])

    words = iter("abcd7")
    rollout, generator = await play(agent, script=lambda *_: Say(next(words)))
    assert_exact(rollout, generator)
    segments = rollout.trajectory.segments
    assert [TOKENIZER.decode(s.ids[s.mask].tolist()) for s in segments] == [
        "a<|im_end|>", "b<|im_end|>d<|im_end|>", "c<|im_end|>", "7<|im_end|>",
    ]  # fmt: skip
    # The repeated question starts from recorded ids: what was sampled before is prompt there, not trained again.
    repeated, origin = segments[3], segments[1]
    assert repeated.ids[: repeated.prompt_length].tolist() == origin.ids[: repeated.prompt_length].tolist()
    assert not repeated.mask[: repeated.prompt_length].any()


@pytest.mark.asyncio
async def test_parallel_conversations_in_one_session_do_not_mix() -> None:
    def script(_: str, turn: int, ids: Any) -> Say:
        word = "seven" if "seven" in TOKENIZER.decode(list(ids)) else "nine"
        return Say(f"{word} {turn % 7}", seconds=0.01)

    async def talk(client: Any, word: str) -> None:
        messages: list[Any] = [{"role": "user", "content": f"say {word}"}]
        for _ in range(3):
            said = (await ask(client, messages)).choices[0].message.content
            assert said.startswith(word)
            messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "again"}]

    async def agent(client: Any, session: Session) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(talk(client, "seven"))
            group.create_task(talk(client, "nine"))

    rollout, generator = await play(agent, script=script)
    assert len(rollout.trajectory.segments) == 2
    for segment, word in zip(rollout.trajectory.segments, ("seven", "nine"), strict=True):
        texts = TOKENIZER.decode(segment.ids[segment.mask].tolist()).split("<|im_end|>")[:3]
        assert len({t.split()[0] for t in texts}) == 1
        assert f"say {texts[0].split()[0]}" in TOKENIZER.decode(segment.ids.tolist()), word


@pytest.mark.asyncio
async def test_two_sessions_at_once_are_kept_apart_by_their_keys() -> None:
    async with proxy_host(ProxyHost(AgentCommand(argv=["true"]))) as host:
        together = asyncio.Barrier(2)
        keys: dict[str, dict[str, str]] = {}

        async def one(word: str) -> Rollout:
            async def agent(client: Any, session: Session) -> None:
                keys[word] = host.variables(session)
                await together.wait()
                other = keys["b" if word == "a" else "a"]["OPENAI_API_KEY"]
                assert (await ask(client, [{"role": "user", "content": word}])).choices[0].message.content == word
                foreign = openai.AsyncOpenAI(base_url=keys[word]["OPENAI_BASE_URL"], api_key=other, max_retries=0)
                async with foreign:
                    with pytest.raises(openai.AuthenticationError, match="opens no session, or another one"):
                        await ask(foreign, QUESTION)
                by_key = openai.AsyncOpenAI(base_url=f"{host.url}/v1", api_key=keys[word]["OPENAI_API_KEY"])
                async with by_key:  # the key alone names the session too
                    assert [m.id async for m in await by_key.models.list()] == ["policy"]
                    assert (await by_key.models.retrieve("policy")).owned_by == "agentrl"

            return await run_rollout(
                TASK, loop="proxy", template=ChatTemplate(TOKENIZER, tools=None),
                generator=ScriptedGenerator(TOKENIZER, [Say(word)]), toolbox=Toolbox(), scorer=Scorer(fn=lambda **_: 1.0),
                limits=Limits(), sampling=SamplingParams(max_new_tokens=64), trajectory_id=f"t/1/0/{word}/0", group_id="t/1/0",
                ordinal=0, sample_index=0, attempt=0, env_name="e", host=Inline(host, agent),
            )  # fmt: skip

        first, second = await asyncio.gather(one("a"), one("b"))
        assert [r.episode.assistant_text for r in (first, second)] == ["a", "b"]
        async with httpx.AsyncClient(base_url=host.url) as raw:
            late = await raw.post("/v1/chat/completions", headers={"Authorization": f"Bearer {keys['a']['OPENAI_API_KEY']}"})
            assert (late.status_code, late.json()["error"]["code"]) == (410, "session_closed")
            assert (await raw.get("/health")).json() == {"status": "ok", "sessions": 0}
            nowhere = await raw.get("/v1/nothing")
            assert (nowhere.status_code, nowhere.json()["error"]["type"]) == (404, "not_found_error")


@pytest.mark.asyncio
async def test_a_connection_is_kept_for_an_agent_that_thinks_longer_than_clients_keep_theirs() -> None:
    async with proxy_host(ProxyHost(AgentCommand(argv=["true"]))) as host:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(host.url.rpartition(":")[2]))
        for _ in range(2):
            writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            async with asyncio.timeout(250):
                head = await reader.readuntil(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 200"), head
                await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]))
            pass_time(20)
            for _ in range(20):
                await asyncio.sleep(0.001)
        writer.close()


@pytest.mark.asyncio
async def test_stop_strings_end_the_turn_and_what_came_after_is_not_recorded() -> None:
    async def agent(client: Any, session: Session) -> None:
        answer = (await ask(client, QUESTION, stop=["END", "</x>"])).choices[0]
        assert (answer.message.content, answer.finish_reason) == ("before ", "stop")
        await ask(client, [*QUESTION, {"role": "assistant", "content": "before "}, {"role": "user", "content": "Go on."}])

    rollout, generator = await play(agent, "before END after and more words", "7")
    (segment,) = rollout.trajectory.segments
    text = TOKENIZER.decode(segment.ids.tolist())
    assert "before END" in text
    assert "after" not in text
    whole = generator.generations["t/1/0/0/0"][0]
    kept = rollout.trajectory.turns[0].end - rollout.trajectory.turns[0].start
    start = segment.prompt_length
    assert segment.ids[start : start + kept].tolist() == whole.ids[:kept]
    assert segment.ids[start + kept] == TOKENIZER.eos_token_id  # the missing end of the turn is observed, not sampled
    assert not segment.mask[start + kept]


@pytest.mark.asyncio
async def test_logprobs_are_the_recorded_ones_and_sampling_is_the_runs() -> None:
    found: list[Any] = []

    async def agent(client: Any, session: Session) -> None:
        answer = await ask(client, QUESTION, logprobs=True, temperature=0.1, top_p=0.5, max_tokens=3, seed=1)
        found.extend(answer.choices[0].logprobs.content)
        assert answer.choices[0].finish_reason == "length"

    rollout, generator = await play(agent, "one two three four five")
    segment = rollout.trajectory.segments[0]
    assert [np.float32(x.logprob) for x in found] == segment.logprobs[segment.mask].tolist()
    assert "".join(x.token for x in found) == TOKENIZER.decode(segment.ids[segment.mask].tolist())
    sampling = generator.requests[0][2]
    assert (sampling.temperature, sampling.top_p, sampling.max_new_tokens) == (0.7, 1.0, 3)
    followed, generator = await play(
        agent, "one two three four five", host=ProxyHost(AgentCommand(argv=["true"]), follows_request=True)
    )
    assert (generator.requests[0][2].temperature, generator.requests[0][2].top_p) == (0.1, 0.5)
    assert len(followed.trajectory.segments) == 1


@pytest.mark.asyncio
async def test_responses_carry_text_calls_and_the_conversation_by_id() -> None:
    tools = [{"type": "function", "name": "add", "parameters": TOOLS[0]["function"]["parameters"]}]

    async def agent(client: Any, session: Session) -> None:
        first = await client.responses.create(model="policy", input="What is 3 + 4?", tools=tools)
        (call,) = [o for o in first.output if o.type == "function_call"]
        assert (call.name, json.loads(call.arguments), first.status) == ("add", {"a": 3}, "completed")
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "7"}
        second = await client.responses.create(model="policy", previous_response_id=first.id, input=[result], tools=tools)
        assert second.output_text == "It is 7"
        stream = await client.responses.create(
            model="policy", previous_response_id=second.id, input="Sure?", tools=tools, stream=True
        )
        events = [event async for event in stream]
        assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == "yes, it is 7"
        assert events[-1].type == "response.completed"
        assert events[-1].response.output_text == "yes, it is 7"
        items = [
            {"role": "user", "content": [{"type": "input_text", "text": "What is 3 + 4?"}]},
            call.model_dump(),
            result,
            second.output[0].model_dump(),
            {"role": "user", "content": "Sure?"},
            events[-1].response.output[0].model_dump(),
            {"role": "user", "content": "End."},
        ]
        await client.responses.create(model="policy", input=items, tools=tools)  # the whole history, by value
        with pytest.raises(openai.BadRequestError, match="no response of this session"):
            await client.responses.create(model="policy", previous_response_id="resp_x", input="x")

    rollout, generator = await play(agent, CALL, "It is 7", "yes, it is 7", "7")
    assert_exact(rollout, generator)
    assert len(rollout.trajectory.segments) == 1


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tool_choice": "required", "tools": TOOLS}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"top_logprobs": 3, "logprobs": True}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content[0]"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": "It is"}]}, "messages"),
        ({"n": 0}, "n"),
        ({"functions": [{"name": "add", "parameters": {}}]}, "functions"),
        ({"tools": [*TOOLS, {"type": "web_search"}]}, "tools[1]"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0]"),
    ],
)
async def test_what_is_not_served_is_refused_by_name_in_openais_shape(change: dict[str, Any], param: str) -> None:
    async def agent(client: Any, session: Session) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(**{"model": "m", "messages": QUESTION, **change})
        assert caught.value.param == param
        assert caught.value.type == "invalid_request_error"
        assert caught.value.body["message"]
        await ask(client, QUESTION)

    rollout, _ = await play(agent, "7")
    assert rollout.trajectory.reward == 1.0


@pytest.mark.asyncio
async def test_arguments_that_nest_without_end_are_shown_as_they_were_written() -> None:
    written = "[" * 100_000
    call = {"id": "call_x", "type": "function", "function": {"name": "add", "arguments": written}}

    async def agent(client: Any, session: Session) -> None:
        history = [*QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}]
        await ask(client, [*history, {"role": "tool", "tool_call_id": "call_x", "content": "7"}])

    rollout, _ = await play(agent, "7")
    (segment,) = rollout.trajectory.segments
    assert written[:64] in TOKENIZER.decode(segment.ids[: segment.prompt_length].tolist())


@pytest.mark.asyncio
async def test_malformed_calls_are_text_and_limits_answer_as_openai_does() -> None:
    async def agent(client: Any, session: Session) -> None:
        answer = (await ask(client, QUESTION, tools=TOOLS)).choices[0]
        assert (answer.finish_reason, answer.message.tool_calls) == ("stop", None)
        assert "<tool_call>" in answer.message.content
        quiet = (await ask(client, QUESTION, tools=TOOLS, tool_choice="none")).choices[0]
        assert quiet.message.content == CALL
        with pytest.raises(openai.BadRequestError) as caught:
            await ask(client, QUESTION)
        assert (caught.value.code, session.limit) == ("turn_limit_reached", "max_turns")

    await play(agent, "<tool_call>\n{'name'}\n</tool_call>", CALL, max_turns=2)

    async def chatty(client: Any, session: Session) -> None:
        await ask(client, QUESTION)
        with pytest.raises(openai.BadRequestError) as caught:
            await ask(client, QUESTION)
        assert (caught.value.code, session.limit) == ("context_length_exceeded", "max_tokens")

    rollout, _ = await play(chatty, "word " * 40, max_tokens=10)
    assert rollout.trajectory.num_sampled == 10


@pytest.mark.asyncio
async def test_failures_of_the_engines_are_errors_that_the_sdk_retries_and_nothing_of_them_is_recorded() -> None:
    async def agent(client: Any, session: Session) -> None:
        with pytest.raises(openai.InternalServerError) as caught:
            await ask(client, QUESTION)
        assert (caught.value.status_code, type(session.failure)) == (503, GenerationError)
        await ask(client, QUESTION)
        assert session.failure is None

    broken = Say("x", error=GenerationError("no server"))

    def script(_: str, turn: int, __: Any) -> Say:
        return broken if not calls.append(turn) and len(calls) == 1 else Say("7")

    calls: list[int] = []
    rollout, generator = await play(agent, script=script)
    assert rollout.episode.num_turns == 1


@pytest.mark.asyncio
async def test_a_reward_by_api_is_the_rollouts_and_the_last_one_counts() -> None:
    async def agent(client: Any, session: Session) -> None:
        await ask(client, QUESTION)
        base = str(client.base_url).removesuffix("/v1/")
        headers = {"Authorization": f"Bearer {session.key}"}
        async with httpx.AsyncClient(headers=headers) as raw:
            assert (await raw.post(f"{base}/reward", json={"reward": 0.1})).json() == {"ok": True, "reward": 0.1}
            assert (await raw.post(f"{base}/reward", json={"reward": 1.0, "terms": {"style": 0.5}})).json()["reward"] == 1.5
            refused = await raw.post(f"{base}/reward", content='{"reward": NaN}')
            assert refused.status_code == 400
            assert (await raw.get(base)).json()["turns"] == 1
            assert (
                await raw.post(f"{base}/reward", json={"reward": 1}, headers={"Authorization": "Bearer x"})
            ).status_code == 401
            assert (await raw.post(f"{base}/v1/chat/completions", content=b" " * (17 << 20))).status_code == 413

    rollout, _ = await play(agent, "whatever")
    assert dict(rollout.trajectory.reward_terms) == {"correct": 1.0, "style": 0.5}
    assert rollout.trajectory.reward == 1.5


@pytest.mark.asyncio
async def test_a_request_that_runs_when_the_rollout_ends_is_told_so_and_leaves_no_trace() -> None:
    outcome: list[Any] = []

    async def agent(client: Any, session: Session) -> None:
        await ask(client, QUESTION)

        async def slow() -> None:
            with pytest.raises(openai.APIStatusError) as caught:
                await ask(client, [{"role": "user", "content": "slow"}])
            outcome.append(caught.value.status_code)

        async with asyncio.TaskGroup() as group:
            group.create_task(slow())
            while not session._scopes:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            session.close()

    rollout, _ = await play(agent, "7", Say("never", seconds=30))
    assert outcome == [410]
    assert (rollout.episode.num_turns, len(rollout.trajectory.segments)) == (1, 1)


@pytest.mark.asyncio
async def test_a_stream_whose_rollout_ends_with_its_last_token_is_recorded_once() -> None:
    class Ending(ScriptedGenerator):
        """Ends the rollout when the last token was told."""

        async def generate(self, *args: Any, **more: Any) -> Any:
            generation = await super().generate(*args, **more)
            sessions[0].close()
            return generation

    sessions: list[Session] = []

    async def agent(client: Any, session: Session) -> None:
        sessions.append(session)

        async def listen() -> None:
            async for chunk in await ask(client, QUESTION, stream=True):
                heard.append(chunk.choices[0].delta.content)

        with pytest.raises(openai.APIError, match="the rollout ended while this request ran"):
            await listen()

    heard: list[str] = []
    rollout, generator = await play(agent, generator=Ending(TOKENIZER, [Say("one two three")]))
    assert_exact(rollout, generator)
    assert ("".join(heard), [t.finish for t in rollout.trajectory.turns]) == ("one two three", ["abort"])
