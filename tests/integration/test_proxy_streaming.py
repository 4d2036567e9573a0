"""Streamed answers of the proxy under the unmodified ``openai`` SDK, over the real manager and fake SGLang servers.

``test_agents.py`` streams from a real engine.
"""

import json
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from proxy_kit import Agent, Inline

from agentrl.rollout.agent_loop import Limits, Rollout, run_rollout
from agentrl.rollout.chat_template import ChatTemplate
from agentrl.rollout.proxy.agent_process import AgentCommand
from agentrl.rollout.proxy.host import ProxyHost, proxy_host
from agentrl.rollout.proxy.session import Session
from agentrl.rollout.reward import Scorer
from agentrl.rollout.toolbox import Toolbox
from agentrl.serving.server_manager import AsyncLLMServerManager
from agentrl.testing.fake_sglang import VOCAB_SIZE, FakeSGLang, pseudo_logprob
from agentrl.testing.tiny_model import make_tiny_tokenizer
from agentrl.testing.waits import until
from agentrl.types import SamplingParams, Task

openai = pytest.importorskip("openai")

TOKENIZER = make_tiny_tokenizer(vocab_size=VOCAB_SIZE)
TASK = Task(id="t/1", prompt=[{"role": "user", "content": "What is 3 + 4?"}], data_source="sums", ground_truth="7")
QUESTION: list[Any] = [{"role": "user", "content": "What is 3 + 4?"}]
TOOLS: list[Any] = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
CALL = 'I add.\n<tool_call>\n{"name": "add", "arguments": {"a": "É 🧮"}}\n</tool_call>'
LABEL = "e1-v3"


def saying(*texts: str) -> Callable[[Sequence[int]], int]:
    """A sampler that says one text per assistant turn, and ends it."""
    opening = TOKENIZER.encode("<|im_start|>assistant\n", add_special_tokens=False)
    turns = [[*TOKENIZER.encode(text, add_special_tokens=False), TOKENIZER.eos_token_id] for text in texts]

    def sample(context: Sequence[int]) -> int:
        begins = [i for i in range(len(context)) if list(context[i : i + len(opening)]) == opening]
        return turns[len(begins) - 1][len(context) - begins[-1] - len(opening)]

    return sample


@asynccontextmanager
async def fakes(*texts: str, servers: int = 1) -> AsyncGenerator[tuple[AsyncLLMServerManager, list[FakeSGLang]]]:
    running = [FakeSGLang(label=LABEL, sampler=saying(*texts)) for _ in range(servers)]
    async with AsyncLLMServerManager() as manager:
        try:
            for server in running:
                await server.start()
                manager.add_server(server.url)
                manager.set_verified(server.url, LABEL)
            manager.require_version(LABEL)
            yield manager, running
        finally:
            for server in running:
                await server.kill()


async def play(manager: AsyncLLMServerManager, agent: Agent) -> Rollout:
    async with proxy_host(ProxyHost(AgentCommand(argv=["true"]))) as host:
        return await run_rollout(
            TASK, loop="proxy", template=ChatTemplate(TOKENIZER, tools=None), generator=manager, toolbox=Toolbox(),
            scorer=Scorer(fn=lambda **_: 1.0), limits=Limits(), sampling=SamplingParams(max_new_tokens=512),
            trajectory_id="t/1/0/0/0", group_id="t/1/0", ordinal=0, sample_index=0, attempt=0, env_name="e",
            host=Inline(host, agent),
        )  # fmt: skip


async def ask(client: Any, messages: list[Any], **more: Any) -> Any:
    return await client.chat.completions.create(model="policy", messages=messages, **more)


def record_of(rollout: Rollout) -> list[Any]:
    return [
        (s.ids.tolist(), s.mask.tolist(), s.logprobs.tolist(), s.versions.tolist(), s.prompt_length)
        for s in rollout.trajectory.segments
    ]


def text_of(chunks: Sequence[Any], index: int = 0) -> str:
    return "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices if c.index == index)


def count(text: str) -> int:
    return len(TOKENIZER.encode(text, add_special_tokens=False))


@pytest.mark.asyncio
async def test_the_first_chunk_comes_before_the_last_token_and_a_killed_engine_does_not_end_the_stream() -> None:
    said = "Grüße 🧮 und: 3 + 4 is 7, I think."
    half = count("Grüße 🧮 und")
    async with fakes(said, servers=2) as (manager, servers):
        for server in servers:
            server.hold_after(tokens=half)

        async def move_on() -> None:
            (server,) = (s for s in servers if s.num_live)
            assert server.num_tokens == half
            await server.kill()
            await until(lambda: any(s.num_live for s in servers if s is not server))
            for other in servers:
                other.let_go()

        async def agent(client: Any, session: Session) -> None:
            stream = await ask(client, QUESTION, stream=True, stream_options={"include_usage": True}, logprobs=True)
            chunks = []
            async for chunk in stream:
                chunks.append(chunk)
                if text_of(chunks) == "Grüße 🧮 und":
                    await move_on()
            assert text_of(chunks) == said
            assert (chunks[0].choices[0].delta.role, chunks[-2].choices[0].finish_reason) == ("assistant", "stop")
            assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], count(said) + 1)
            tokens = [token for c in chunks if c.choices and c.choices[0].logprobs for token in c.choices[0].logprobs.content]
            assert [token.logprob for token in tokens] == [pseudo_logprob(i) for i in sampled]
            assert b"".join(bytes(token.bytes) for token in tokens[-2:]) == b".<|im_end|>"

        sampled = [*TOKENIZER.encode(said, add_special_tokens=False), TOKENIZER.eos_token_id]
        rollout = await play(manager, agent)
        assert manager.counters()["continuations"] == 1
    (segment,) = rollout.trajectory.segments
    assert segment.ids[segment.mask].tolist() == sampled
    assert set(segment.versions[segment.mask].tolist()) == {3}


@pytest.mark.asyncio
async def test_what_is_recorded_and_said_is_the_same_streamed_and_not() -> None:
    texts = [CALL, "It is 7 STOP and more", "a, b, c", "7"]

    def agent_that(heard: list[Any], *, streams: bool) -> Agent:
        async def one(client: Any, messages: list[Any], **more: Any) -> list[dict[str, Any]]:
            if not streams:
                whole = await ask(client, messages, **more)
                return [{**c.message.model_dump(exclude_none=True), "finish": c.finish_reason} for c in whole.choices]
            messages_said: dict[int, dict[str, Any]] = {}
            async for chunk in await ask(client, messages, stream=True, **more):
                for choice in chunk.choices:
                    said = messages_said.setdefault(choice.index, {"role": "assistant", "content": ""})
                    assert "<tool" not in (choice.delta.content or "")
                    said["content"] += choice.delta.content or ""
                    for call in choice.delta.tool_calls or ():
                        calls = said.setdefault("tool_calls", [])
                        if call.id:
                            calls.append(
                                {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": ""}}
                            )
                        calls[call.index]["function"]["arguments"] += call.function.arguments
                    if choice.finish_reason:
                        said["finish"] = choice.finish_reason
            return [messages_said[index] for index in sorted(messages_said)]

        async def agent(client: Any, session: Session) -> None:
            (first,) = await one(client, QUESTION, tools=TOOLS)
            assert (first["content"], first["finish"]) == ("I add.", "tool_calls")
            (call,) = first["tool_calls"]
            assert json.loads(call["function"]["arguments"]) == {"a": "É 🧮"}
            history = [*QUESTION, first, {"role": "tool", "tool_call_id": call["id"], "content": "7"}]
            (second,) = await one(client, history, tools=TOOLS, stop=["STOP", "never"])
            history += [second, {"role": "user", "content": "Spell."}]
            third = await one(client, history, tools=TOOLS, n=2)
            heard.extend([first["content"], second, *third])
            await one(client, [*history, third[1], {"role": "user", "content": "End."}], tools=TOOLS, max_tokens=1)

        return agent

    records, heard = [], [list[Any](), list[Any]()]
    for streams in (False, True):
        async with fakes(*texts) as (manager, _):
            rollout = await play(manager, agent_that(heard[streams], streams=streams))
        records.append((record_of(rollout), [(t.kind, t.text, t.finish) for t in rollout.trajectory.turns]))
    assert records[0] == records[1]
    assert len(records[0][0]) == 2  # n=2: the second choice is a segment of its own
    assert heard[0] == heard[1]
    assert heard[0][1] == {"role": "assistant", "content": "It is 7 ", "finish": "stop"}


@pytest.mark.asyncio
async def test_a_client_that_hangs_up_ends_the_generation_and_what_was_sampled_is_on_record() -> None:
    said = "one two three four five six"
    part = "one two three"
    async with fakes(said, "7") as (manager, (server,)):
        server.hold_after(tokens=count(part))

        async def agent(client: Any, session: Session) -> None:
            heard = ""
            async with await ask(client, QUESTION, stream=True) as stream:
                async for chunk in stream:
                    heard += chunk.choices[0].delta.content or ""
                    if heard == part:
                        break
            await until(lambda: server.num_live == 0 and not session._streamed)
            assert (server.num_tokens, manager.stats()[0].requests_in_flight) == (count(part), 0)
            more = [*QUESTION, {"role": "assistant", "content": heard}, {"role": "user", "content": "Enough."}]
            assert (await ask(client, more)).choices[0].message.content == "7"

        rollout = await play(manager, agent)
    (segment,) = rollout.trajectory.segments  # what it read is what is on record, so the conversation goes on there
    assert TOKENIZER.decode(segment.ids[segment.mask].tolist()) == f"{part}7<|im_end|>"
    assert segment.logprobs[segment.mask].tolist() == pytest.approx([pseudo_logprob(i) for i in segment.ids[segment.mask]])
    assert set(segment.versions[segment.mask].tolist()) == {3}
    assert [(t.kind, t.text, t.finish) for t in rollout.trajectory.turns] == [
        ("model", part, "abort"), ("env", "Enough.", ""), ("model", "7", "stop"),
    ]  # fmt: skip


@pytest.mark.asyncio
async def test_an_agent_that_ends_in_mid_stream_leaves_what_it_may_have_read_on_record() -> None:
    async with fakes("one two three") as (manager, (server,)):
        server.hold_after(tokens=2)

        async def agent(client: Any, session: Session) -> None:
            stream = await ask(client, QUESTION, stream=True)
            await anext(aiter(stream))

        rollout = await play(manager, agent)
        await until(lambda: server.num_live == 0)
    (segment,) = rollout.trajectory.segments
    assert segment.ids[segment.mask].tolist() == TOKENIZER.encode("one two three", add_special_tokens=False)[:2]
    assert [t.finish for t in rollout.trajectory.turns] == ["abort"]


@pytest.mark.asyncio
async def test_a_failure_before_the_first_token_has_a_status_and_a_later_one_is_an_error_in_the_stream() -> None:
    async with fakes("one two three", "7 and", "7") as (manager, (server,)):

        async def break_down() -> None:
            server.fail_next(400)
            await server.restart_with_base_weights()

        async def agent(client: Any, session: Session) -> None:
            server.fail_next(400)
            with pytest.raises(openai.InternalServerError) as refused:
                await ask(client, QUESTION, stream=True)
            assert (refused.value.status_code, refused.value.code) == (503, "generation")
            server.hold_after(tokens=count("one two"))
            heard: list[str] = []

            async def listen() -> None:
                async for chunk in await ask(client, QUESTION, stream=True):
                    heard.append(chunk.choices[0].delta.content or "")
                    if "".join(heard) == "one two":
                        await break_down()

            with pytest.raises(openai.APIError, match="answered 400: .*scripted") as broken:
                await listen()
            assert ("".join(heard), broken.value.code, session.failure is None) == ("one two", "generation", False)
            more = [*QUESTION, {"role": "assistant", "content": "one two"}, {"role": "user", "content": "So?"}]
            server.hold_after(tokens=count("7"))
            async for event in await client.responses.create(model="policy", input=more, stream=True):
                if event.type == "response.output_text.delta":
                    await break_down()
            assert (event.type, event.response.status, event.response.error.code) == ("response.failed", "failed", "generation")
            more += [{"role": "assistant", "content": "7"}, {"role": "user", "content": "So?"}]
            assert (await ask(client, more)).choices[0].message.content == "7"
            assert session.failure is None

        rollout = await play(manager, agent)
    assert [(t.text, t.finish) for t in rollout.trajectory.turns if t.kind == "model"] == [
        ("one two", "abort"), ("7", "abort"), ("7", "stop"),
    ]  # fmt: skip
    assert len(rollout.trajectory.segments) == 1


@pytest.mark.asyncio
async def test_a_call_is_streamed_when_its_block_has_closed_and_can_be_answered_before_the_turn_is_over() -> None:
    other = '<tool_call>{"name": "sub", "arguments": {}}</tool_call>'
    part = f"{CALL}\n<tool_call>"
    async with fakes(f"{CALL}\n{other} and more", "7") as (manager, (server,)):
        server.hold_after(tokens=count(part))

        async def agent(client: Any, session: Session) -> None:
            calls: dict[int, dict[str, Any]] = {}
            text = ""
            async with await ask(client, QUESTION, tools=TOOLS, stream=True) as stream:
                async for chunk in stream:
                    text += chunk.choices[0].delta.content or ""
                    for call in chunk.choices[0].delta.tool_calls or ():
                        if call.id:
                            assert (call.type, call.function.name, call.function.arguments) == ("function", "add", "")
                            calls[call.index] = {"id": call.id, "type": "function", "function": {"name": "add", "arguments": ""}}
                        calls[call.index]["function"]["arguments"] += call.function.arguments
                    if calls and calls[0]["function"]["arguments"]:
                        break
            await until(lambda: server.num_live == 0 and not session._streamed)
            assert (text, json.loads(calls[0]["function"]["arguments"])) == ("I add.", {"a": "É 🧮"})
            said = {"role": "assistant", "content": text, "tool_calls": [calls[0]]}
            result = {"role": "tool", "tool_call_id": calls[0]["id"], "content": "7"}
            assert (await ask(client, [*QUESTION, said, result], tools=TOOLS)).choices[0].message.content == "7"

        rollout = await play(manager, agent)
    assert len(rollout.trajectory.segments) == 1
    assert [(t.kind, t.text, t.name, t.finish) for t in rollout.trajectory.turns] == [
        ("model", part, "", "abort"), ("tool", "7", "add", ""), ("model", "7", "", "stop"),
    ]  # fmt: skip


@pytest.mark.asyncio
async def test_a_response_streams_its_text_and_each_call_before_the_last_token() -> None:
    async with fakes(f"Well.\n{CALL}\n{CALL}") as (manager, (server,)):
        server.hold_after(tokens=count(f"Well.\n{CALL}\n"))

        async def agent(client: Any, session: Session) -> None:
            tools = [{"type": "function", "name": "add", "parameters": {"type": "object", "properties": {}}}]
            text, kinds, items = "", [], []
            async for event in await client.responses.create(model="policy", input="3 + 4?", tools=tools, stream=True):
                kinds.append(event.type)
                text += event.delta if event.type == "response.output_text.delta" else ""
                if kinds[-1] == "response.function_call_arguments.done":
                    assert text == "Well.\nI add."
                    items.append((event.item_id, event.arguments))
                    server.let_go()
            message, *calls = event.response.output
            assert (message.content[0].text, text) == ("Well.\nI add.", "Well.\nI add.")
            assert items == [(call.id, call.arguments) for call in calls]
            assert [(call.name, json.loads(call.arguments)) for call in calls] == [("add", {"a": "É 🧮"})] * 2
            assert kinds[0] == "response.created"
            assert kinds[-2:] == ["response.output_item.done", "response.completed"]
            assert kinds.index("response.output_text.done") < kinds.index("response.function_call_arguments.done")

        rollout = await play(manager, agent)
    assert rollout.trajectory.num_sampled == count(f"Well.\n{CALL}\n{CALL}") + 1
