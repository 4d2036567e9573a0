"""What one turn costs the rollout process, next to the least any client must pay, in one run.

    python bench/orchestrator.py [--in-flight 64,512] [--repeats 5] [--chunks 1] [--profile FILE]
        [--peer verifiers=/path/to/venv/bin/python] [--peer verl=/path/to/venv/bin/python] [--peer verl-ray=…]

An instant server, a process of its own, answers every request with bytes made beforehand: 512 sampled ids and their
logprobs in SGLang's shape. Episodes have 5 turns after a prompt of 2,048 ids; four turns call a trivial tool.

- ``ours``: ``RolloutWorker`` -> ``run_rollout`` -> ``AsyncLLMServerManager`` -> HTTP, with the real template, parser, tool
  session, builder and scorer. The sink counts.
- ``manager``: ``AsyncLLMServerManager.generate`` alone.
- ``bare``: an aiohttp client that posts ready bytes of the same requests and reads the answer with orjson. The floor.

CPU time is that of the client process, all threads; repeats of the sides alternate, and medians are shown. Peers run in
their own environments (``bench/peers/``) against the same server in the same run: ``NAME-MODE`` is ``run_NAME.py`` with ``--MODE``
(``verl``, ``verl-ray``, ``verl-worker``). What processes of a peer use beside its client is shown below its row.
"""

import argparse
import asyncio
import cProfile
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import aiohttp
import orjson
import uvloop

from agentrl.plugins import tool
from agentrl.process import settle_garbage_collector
from agentrl.rollout.agent_loop import Limits, run_rollout
from agentrl.rollout.chat_template import ChatTemplate
from agentrl.rollout.reward import Scorer
from agentrl.rollout.tool_loading import load_tools
from agentrl.rollout.toolbox import Toolbox
from agentrl.rollout.worker import RolloutWorker
from agentrl.serving.server_manager import AsyncLLMServerManager
from agentrl.testing.tiny_model import EOS_TOKEN_ID, make_tiny_tokenizer
from agentrl.types import Episode, GroupClose, SamplingParams, Score, Task, Trajectory

PROMPT_TOKENS = 2048
TURN_TOKENS = 512
TURNS = 5
GROUP_SIZE = 8
LABEL = "e1-v3"
CALL_TEXT = '<tool_call>\n{"name": "echo", "arguments": {"text": "seven"}}\n</tool_call>'
ANSWER_TEXT = "The answer is 7."


# ---- the instant server


def answers(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids of a turn that calls the tool, and of the last turn."""
    encode: Callable[[str], list[int]] = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    filler = encode(" The boxes hold marbles and each friend has some pencils left." * 100)
    turns: list[list[int]] = []
    for text in (CALL_TEXT, ANSWER_TEXT):
        end = [*encode(text), EOS_TOKEN_ID]
        turns.append(filler[: TURN_TOKENS - len(end)] + end)
    return turns[0], turns[1]


def chunk(ids: Sequence[int], total: int, *, is_last: bool, rng: random.Random) -> dict[str, Any]:
    """One streamed chunk (deltas) or, with all ids, the whole answer."""
    meta: dict[str, Any] = {
        "id": "0" * 32, "finish_reason": {"type": "stop", "matched": ids[-1]} if is_last else None,
        "prompt_tokens": PROMPT_TOKENS, "weight_version": LABEL, "num_retractions": 0, "input_token_logprobs": [],
        "output_token_logprobs": [[-rng.random() * 1.7, token, None] for token in ids], "output_token_logprobs_length": total,
        "reasoning_tokens": 0, "completion_tokens": total, "cached_tokens": PROMPT_TOKENS - 1, "dp_rank": None,
    }  # fmt: skip
    if is_last:
        meta |= {"weight_versions": [{"version": LABEL, "start": 0, "end": total}], "e2e_latency": 0.0226}
    return {"text": "", "output_ids": list(ids), "meta_info": meta}


def wire_of(ids: list[int], num_chunks: int, *, stream: bool) -> bytes:
    """A whole HTTP response."""
    rng = random.Random(len(ids) + ids[0])
    if not stream:
        body = orjson.dumps(chunk(ids, len(ids), is_last=True, rng=rng))
        return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    step = -(-len(ids) // num_chunks)
    parts = [b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"]
    for start in range(0, len(ids), step):
        end = min(len(ids), start + step)
        event = b"data: " + orjson.dumps(chunk(ids[start:end], end, is_last=end == len(ids), rng=rng)) + b"\n\n"
        event += b"data: [DONE]\n\n" if end == len(ids) else b""
        parts.append(b"%x\r\n%s\r\n" % (len(event), event))
    return b"".join([*parts, b"0\r\n\r\n"])


def chat_wire(tokenizer: Any) -> tuple[bytes, bytes]:
    """OpenAI chat completions of a call and of the answer, with ids and logprobs as SGLang and vLLM give them on request."""
    wires: list[bytes] = []
    for ids, text in zip(answers(tokenizer), (CALL_TEXT, ANSWER_TEXT), strict=True):
        rng = random.Random(ids[0])
        spoken = str(tokenizer.decode(ids[: -len(tokenizer.encode(text, add_special_tokens=False)) - 1]))
        message: dict[str, Any] = {"role": "assistant", "content": spoken}
        if text == CALL_TEXT:
            function = {"name": "echo", "arguments": '{"text": "seven"}'}
            message["tool_calls"] = [{"id": "call_0", "type": "function", "function": function}]
        logprobs = [{"token": f"token_id:{i}", "logprob": -rng.random() * 1.7, "bytes": None, "top_logprobs": []} for i in ids]
        choice: dict[str, Any] = {
            "index": 0, "message": message, "finish_reason": "tool_calls" if text == CALL_TEXT else "stop",
            "logprobs": {"content": logprobs, "refusal": None}, "token_ids": ids,
        }  # fmt: skip
        usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": len(ids), "total_tokens": PROMPT_TOKENS + len(ids)}
        body = orjson.dumps(
            {
                "id": "chatcmpl-0",
                "object": "chat.completion",
                "created": 1,
                "model": "instant",
                "choices": [choice],
                "usage": usage,
            }
        )
        wires.append(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    return wires[0], wires[1]


class InstantServer(asyncio.Protocol):
    """Answers HTTP posts on one connection, one after the other. Which turn it is follows from the request's length."""

    wires: dict[tuple[bool, bool], bytes]
    """(streamed, last turn) -> response."""
    chats: tuple[bytes, bytes]

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are not subclasses

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        assert self._transport is not None
        while True:
            head_end = self._buffer.find(b"\r\n\r\n")
            if head_end < 0:
                return
            head = bytes(self._buffer[:head_end])
            at = head.lower().find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self._buffer) < head_end + 4 + length:
                return
            body = bytes(self._buffer[head_end + 4 : head_end + 4 + length])
            del self._buffer[: head_end + 4 + length]
            self._transport.write(self._answer(head, body))

    def _answer(self, head: bytes, body: bytes) -> bytes:
        if head.startswith(b"POST /generate"):
            num_turns = round((body.count(b",") - PROMPT_TOKENS) / (TURN_TOKENS + 20))
            return self.wires[b'"stream":true' in body[-600:] or b'"stream":true' in body[:200], num_turns >= TURNS - 1]
        if head.startswith(b"POST /v1/chat/completions"):
            num_turns = body.count(b'"role":"tool"') + body.count(b'"role": "tool"')
            return self.chats[num_turns >= TURNS - 1]
        info = b'{"model_path":"instant","weight_version":"%s","object":"list","data":[]}' % LABEL.encode()
        return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(info), info)


async def serve(num_chunks: int) -> None:
    tokenizer = make_tiny_tokenizer()
    call, answer = answers(tokenizer)
    InstantServer.wires = {
        (stream, is_last): wire_of(answer if is_last else call, num_chunks, stream=stream)
        for stream in (False, True)
        for is_last in (False, True)
    }
    InstantServer.chats = chat_wire(tokenizer)
    server = await asyncio.get_running_loop().create_server(InstantServer, "127.0.0.1", 0, backlog=4096)
    print(f"LISTENING {server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


# ---- the sides


@dataclass(frozen=True)
class Sample:
    """One repeat of one side."""

    turns: int
    wall_s: float
    cpu_s: float
    beside_s: dict[str, float] = field(default_factory=dict[str, float])
    """CPU time of other processes of this side, by role."""

    @property
    def turns_per_s(self) -> float:
        return self.turns / self.wall_s

    @property
    def us_per_turn(self) -> float:
        return 1e6 * self.cpu_s / self.turns


_ECHOES = itertools.count()


@tool
async def echo(text: str) -> str:
    """Say it again.

    Args:
        text: what to say.
    """
    return f"{text} {next(_ECHOES) % 100_000:05d}"  # no two results alike: nothing may be gained by remembering them


class TrivialEnv:
    """Scores without work."""

    def prompt(self, task: Task) -> Sequence[dict[str, Any]]:
        return task.prompt

    async def score(self, episode: Episode) -> Score:
        return Score(correct=float("7" in episode.final))

    async def reply(self, episode: Episode) -> str | None:
        return None


@dataclass
class Standing:
    run_epoch: int = 1
    version: int = 3
    consumed_groups: int = 0
    closed_groups: int = 0


class CountingSink:
    """Takes everything at once and checks that it is what was asked for."""

    def __init__(self) -> None:
        self.standing = Standing()
        self.turns = 0
        self._closed: set[int] = set()
        self._lowest_open = 0

    async def put_trajectory(self, trajectory: Trajectory) -> None:
        turns = sum(turn.kind == "model" for turn in trajectory.turns)
        assert turns == TURNS, f"{turns} turns, stop={trajectory.stop}"
        assert trajectory.num_sampled == TURNS * TURN_TOKENS
        assert trajectory.reward == 1.0
        self.turns += turns

    async def close_group(self, close: GroupClose) -> None:
        assert not close.failed, close.failed
        self.standing.closed_groups += 1
        self._closed.add(close.ordinal)
        while self._lowest_open in self._closed:
            self._lowest_open += 1

    async def present(self, ids: Sequence[str]) -> set[str]:
        return set()

    async def next_open_ordinal(self) -> int:
        return self._lowest_open

    async def is_closed(self, ordinals: Iterable[int]) -> set[int]:
        return self._closed.intersection(ordinals)

    async def progress(self) -> Standing:
        return self.standing


class Bench:
    """The parts that all repeats share."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.tokenizer = make_tiny_tokenizer()
        self.template = ChatTemplate(self.tokenizer, tools=self.toolbox().schemas())
        self.limits = Limits(max_turns=TURNS, max_tokens=8192, max_tokens_per_turn=TURN_TOKENS, turn_timeout_s=120)
        self.text = self._prompt_text()
        self.bodies = self._bodies()

    def toolbox(self) -> Toolbox:
        """The trivial tool; one toolbox per event loop."""
        entry = {"use": f"{Path(__file__).resolve()}:echo", "concurrency": 1024}
        return load_tools([entry], tokenizer=self.tokenizer)

    def task(self, ordinal: int) -> Task:
        """Every group has a prompt of its own."""
        prompt = [{"role": "user", "content": f"{ordinal % 100:02d} {self.text}"}]
        return Task(id=f"t{ordinal}", prompt=prompt, data_source="bench", ground_truth="7")

    def _prompt_text(self) -> str:
        word = " marbles"
        per_word = len(self.tokenizer.encode(word * 64, add_special_tokens=False)) / 64
        empty = len(self.template.prompt_ids([{"role": "user", "content": "00 "}]))
        return word * round((PROMPT_TOKENS - empty) / per_word)

    def _bodies(self) -> list[bytes]:
        """The requests of one episode, as ready bytes."""
        call, _ = answers(self.tokenizer)
        ids = self.template.prompt_ids(self.task(0).prompt)
        assert abs(len(ids) - PROMPT_TOKENS) < 16, len(ids)
        observation = self.template.observation_ids([{"role": "tool", "content": "seven 00000"}], last_sampled=call[-1])
        params = {"max_new_tokens": TURN_TOKENS, "temperature": 1.0, "skip_special_tokens": False, "stop_token_ids": [2, 0]}
        bodies: list[bytes] = []
        for _ in range(TURNS):
            body: dict[str, Any] = {
                "rid": "0" * 32, "input_ids": ids, "sampling_params": params, "stream": False, "return_logprob": True,
                "logprob_start_len": -1, "extra_key": LABEL,
            }  # fmt: skip
            bodies.append(orjson.dumps(body))
            ids = ids + call + observation
        return bodies

    async def ours(self, in_flight: int, episodes: int, session: aiohttp.ClientSession) -> int:
        sink, toolbox = CountingSink(), self.toolbox()
        scorer = Scorer(env=TrivialEnv())
        sampling = SamplingParams(max_new_tokens=TURN_TOKENS)
        async with AsyncLLMServerManager(session=session, vocab_size=len(self.tokenizer)) as manager:
            manager.add_server(self.url)
            manager.set_verified(self.url, LABEL)
            manager.require_version(LABEL)

            async def rollout(
                task: Task, trajectory_id: str, group_id: str, ordinal: int, sample: int, attempt: int
            ) -> tuple[Trajectory, Episode]:
                return await run_rollout(
                    task, loop="tool_agent", template=self.template, generator=manager, toolbox=toolbox, scorer=scorer,
                    limits=self.limits, sampling=sampling, trajectory_id=trajectory_id, group_id=group_id, ordinal=ordinal,
                    sample_index=sample, attempt=attempt, env_name="bench",
                )  # fmt: skip

            groups = -(-episodes // GROUP_SIZE)
            worker = RolloutWorker(
                task_at=self.task, sink=sink, read_progress=sink.progress, rollout=rollout, group_size=GROUP_SIZE,
                groups_per_step=groups, max_staleness=1, pipeline_depth=1, in_flight=in_flight, last_ordinal=groups,
            )  # fmt: skip
            await worker.run()
        return sink.turns

    async def manager(self, in_flight: int, episodes: int, session: aiohttp.ClientSession) -> int:
        sampling = SamplingParams(max_new_tokens=TURN_TOKENS, stop_token_ids=(2, 0))
        contexts: list[list[int]] = [orjson.loads(body)["input_ids"] for body in self.bodies]
        async with AsyncLLMServerManager(session=session, vocab_size=len(self.tokenizer)) as manager:
            manager.add_server(self.url)
            manager.set_verified(self.url, LABEL)
            manager.require_version(LABEL)

            async def episode(number: int) -> None:
                for context in contexts:
                    turn = await manager.generate(
                        context, sampling, trajectory_id=str(number), group_id=str(number // GROUP_SIZE), deadline=120.0
                    )
                    assert len(turn.ids) == TURN_TOKENS

            await at_once(in_flight, episodes, episode)
        return episodes * TURNS

    async def bare(self, in_flight: int, episodes: int, session: aiohttp.ClientSession) -> int:
        url, headers = f"{self.url}/generate", {"Content-Type": "application/json"}

        async def episode(_: int) -> None:
            for body in self.bodies:
                async with session.post(url, data=body, headers=headers) as response:
                    assert len(orjson.loads(await response.read())["output_ids"]) == TURN_TOKENS

        await at_once(in_flight, episodes, episode)
        return episodes * TURNS


async def at_once(in_flight: int, count: int, work: Callable[[int], Awaitable[None]]) -> None:
    numbers = iter(range(count))

    async def worker() -> None:
        for number in numbers:
            await work(number)

    async with asyncio.TaskGroup() as group:
        for _ in range(in_flight):
            group.create_task(worker())


Side = Callable[[int, int, aiohttp.ClientSession], Awaitable[int]]


async def measure(side: Side, in_flight: int, episodes: int, profile: str | None = None) -> Sample:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        profiler = cProfile.Profile() if profile else None
        wall, cpu = time.perf_counter(), time.process_time()
        if profiler is not None:
            profiler.enable()
        turns = await side(in_flight, episodes, session)
        if profiler is not None:
            profiler.disable()
            profiler.dump_stats(str(profile))
        return Sample(turns, time.perf_counter() - wall, time.process_time() - cpu)


# ---- the run


def start_server(num_chunks: int) -> tuple[subprocess.Popen[str], str]:
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve", "--chunks", str(num_chunks)], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    line = server.stdout.readline()
    assert line.startswith("LISTENING "), line
    return server, f"http://127.0.0.1:{int(line.split()[1])}"


def run_peer(name: str, python: str, url: str, in_flight: int, episodes: int, tokenizer: str) -> Sample | str:
    """One repeat of a peer in its own environment; the reason where it does not run."""
    stem, _, mode = name.partition("-")
    script = Path(__file__).parent / "peers" / f"run_{stem}.py"
    command = [python, str(script), url, str(in_flight), str(episodes), tokenizer, *([f"--{mode}"] if mode else [])]
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=clean, timeout=300, check=False)
    if done.returncode:
        return f"{name} failed with exit code {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"
    values = json.loads(done.stdout.strip().splitlines()[-1])
    return Sample(int(values["turns"]), float(values["wall_s"]), float(values["cpu_s"]), values.get("beside_cpu_s", {}))


def show(name: str, samples: Sequence[Sample], floor: Sequence[Sample]) -> dict[str, Any]:
    """Print one row; ratios are medians of the ratios of neighbouring repeats, which saw the same machine."""
    ratio = statistics.median(a.us_per_turn / b.us_per_turn for a, b in zip(samples, floor, strict=False))
    rate, cost = (
        statistics.median(s.turns_per_s for s in samples),
        statistics.median(s.us_per_turn for s in samples),
    )
    per_core = 1e6 / cost
    print(
        f"  {name:11} {rate:8.0f} turns/s {rate / TURNS:8.1f} rollouts/s   CPU {cost:7.0f} us/turn "
        f"({min(s.us_per_turn for s in samples):.0f}..{max(s.us_per_turn for s in samples):.0f})   "
        f"{per_core:7.0f} turns/s/core   {ratio:5.2f} x bare",
        flush=True,
    )
    beside = {role: statistics.median(1e6 * s.beside_s.get(role, 0.0) / s.turns for s in samples) for role in samples[0].beside_s}
    if beside:
        print(f"  {'':11} beside it, us/turn: {', '.join(f'{role} {value:.0f}' for role, value in beside.items())}", flush=True)
    return {"side": name, "turns_per_s": rate, "us_per_turn": cost, "ratio": ratio, "beside_us_per_turn": beside}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--in-flight", default="64,512")
    parser.add_argument("--episodes", type=int, default=384, help="per repeat, at least one per place in flight")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--chunks", type=int, default=1, help="chunks of the streamed answer; bare always reads one JSON")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--profile", help="write a cProfile of one repeat of ours and end")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        uvloop.run(serve(args.chunks))
        return
    server, url = start_server(args.chunks)
    folder = tempfile.mkdtemp(prefix="arl-bench-")
    results: list[dict[str, Any]] = []
    try:
        bench = Bench(url)
        bench.tokenizer.save_pretrained(folder)
        settle_garbage_collector()  # as serve does; both sides are measured under it
        sides: dict[str, Side] = {"bare": bench.bare, "manager": bench.manager, "ours": bench.ours}
        for in_flight in (int(n) for n in args.in_flight.split(",")):
            episodes = max(args.episodes, in_flight)
            if args.profile:
                uvloop.run(measure(bench.ours, in_flight, episodes, args.profile))
                return
            samples: dict[str, list[Sample]] = {name: [] for name in sides}
            peers = dict(item.split("=", 1) for item in args.peer)
            failed: dict[str, str] = {}
            for _ in range(args.repeats):
                for name, side in sides.items():
                    samples[name].append(uvloop.run(measure(side, in_flight, episodes)))
                for name, python in peers.items():
                    outcome = failed.get(name) or run_peer(name, python, url, in_flight, episodes, folder)
                    if isinstance(outcome, str):
                        failed[name] = outcome
                    else:
                        samples.setdefault(name, []).append(outcome)
            print(
                f"{in_flight} in flight, {episodes} episodes of {TURNS} turns, {args.chunks} chunk(s), medians of {args.repeats}"
            )
            for name, rows in samples.items():
                results.append({"in_flight": in_flight, **show(name, rows, samples["bare"])})
            for reason in failed.values():
                print(f"  {reason}")
    finally:
        server.kill()
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
