"""verl's ``ToolAgentLoop`` on the episodes of ``bench/orchestrator.py``; run by it in an environment that has verl.

    python bench/peers/run_verl.py URL IN_FLIGHT EPISODES TOKENIZER_DIR [--ray | --worker]

verl (0.9.1) reaches its engines, which need a GPU, through Ray actors. Three rows, each with more of verl's own path:

- no flag (``verl``): the loop alone. Its server client is ours: it posts to the instant server at URL with aiohttp and
  orjson, which is cheaper than what verl has. Measured are loop, template, tokenizing, parser and tool; the other rows have
  them too.
- ``--ray`` (``verl-ray``): the same loop in the same process over verl's ``LLMServerManager``, its ``LLMServerClient`` and its
  ``GlobalRequestLoadBalancer`` actor, all as installed. Ours is the end of the path alone: a replica that needs no GPU and two
  engine actors which answer at once. An engine sends a ready ``TokenOutput`` with the ids and logprobs that it got from the
  instant server at the start; verl's would build one for each answer.
- ``--worker`` (``verl-worker``): as verl's trainer runs it. ``AgentLoopManager`` hands batches of IN_FLIGHT rows to one
  ``AgentLoopWorker`` actor (verl's default is 8; the other rows are one process as well), which makes a loop per row and pads
  and stacks the batch. The batch's lengths just fit the episodes. There is no reward worker.

Prints one line of JSON. ``cpu_s`` is what the process of the loops used, all threads: this one, or with ``--worker`` the
worker's. ``beside_cpu_s`` says what the processes beside it used, by role, to the kernel's tick of 10 ms per process: ``balancer``,
``engines``, ``driver`` (this process, with ``--worker``) and ``ray`` (raylet, GCS, agents, idle workers). The instant server is
counted in no row. Ray is started here, on 127.0.0.1, and ended here.
"""

# ruff: noqa: E402
import os

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # read as ray is imported: its processes listen on 127.0.0.1 alone
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import asyncio
import itertools
import json
import shutil
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import orjson
import psutil
import ray
from hydra import compose, initialize_config_module
from omegaconf import open_dict
from transformers import AutoTokenizer
from verl import DataProto
from verl.experimental.agent_loop.agent_loop import AgentLoopManager, DictConfigWrap, ToolListWrap
from verl.experimental.agent_loop.tool_agent_loop import ToolAgentLoop
from verl.tools.function_tool import function_tool, get_function_tool
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.workers.rollout.llm_server import LLMServerManager
from verl.workers.rollout.replica import RolloutReplica, TokenOutput

PROMPT_TOKENS, TURN_TOKENS, TURNS = 2048, 512, 5
SERVERS = {"name": "sglang", "tensor_model_parallel_size": 1, "nnodes": 1, "n_gpus_per_node": 2}
"""What verl derives its servers from: two of them, one for each (of no) GPU."""
ROLES = {"GlobalRequestLoadBalancer": "balancer", "InstantEngine": "engines", "AgentLoopWorker": "worker"}
"""Class of an actor -> its name in the output."""
_ECHOES = itertools.count()


@function_tool
async def echo(text: str) -> str:
    """Say it again.

    Args:
        text: what to say.
    """
    return f"{text} {next(_ECHOES) % 100_000:05d}"


class DirectClient:
    """What verl's loop asks for tokens."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url, self._session = f"{url}/generate", session

    async def generate(self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any) -> TokenOutput:
        body = {
            "rid": "0" * 32, "input_ids": prompt_ids, "stream": False, "return_logprob": True,
            "sampling_params": {"max_new_tokens": TURN_TOKENS, "temperature": 1.0},
        }  # fmt: skip
        async with self._session.post(self._url, data=orjson.dumps(body)) as response:
            return token_output(await response.read())


def token_output(answer: bytes) -> TokenOutput:
    """verl's form of the instant server's answer."""
    values = orjson.loads(answer)
    logprobs = [entry[0] for entry in values["meta_info"]["output_token_logprobs"]]
    return TokenOutput(token_ids=values["output_ids"], log_probs=logprobs, stop_reason="completed")


# ---- verl's own servers, with nothing to compute


@ray.remote
class InstantEngine:
    """The actor that a replica's server is in verl; answers at once."""

    def __init__(self, call: TokenOutput, answer: TokenOutput) -> None:
        self._call, self._answer = call, answer

    async def generate(
        self,
        prompt_ids: list[int],
        sampling_params: dict[str, Any],
        request_id: str,
        image_data: None = None,
        video_data: None = None,
    ) -> TokenOutput:
        num_turns = round((len(prompt_ids) - PROMPT_TOKENS) / (TURN_TOKENS + 20))  # as the instant server tells
        return self._answer if num_turns >= TURNS - 1 else self._call


class InstantReplica(RolloutReplica):
    """Starts an engine actor instead of a server on GPUs."""

    outputs: tuple[TokenOutput, TokenOutput]
    """A turn that calls the tool, and the last turn."""

    async def init_standalone(self) -> None:
        await self.launch_servers()

    async def launch_servers(self) -> None:
        self._server_address = f"instant-{self.replica_rank}"
        self._server_handle = InstantEngine.remote(*self.outputs)


class InstantServerManager(LLMServerManager):
    """verl's, which takes the class of its replicas from here."""

    rollout_replica_class = InstantReplica


def fetch_outputs(url: str) -> tuple[TokenOutput, TokenOutput]:
    """The instant server's answers to a first and to a last turn."""
    outputs: list[TokenOutput] = []
    for num_turns in (0, TURNS - 1):
        body = orjson.dumps({"input_ids": [7] * (PROMPT_TOKENS + num_turns * (TURN_TOKENS + 20))})
        with urllib.request.urlopen(f"{url}/generate", data=body, timeout=60) as response:
            outputs.append(token_output(response.read()))
    return outputs[0], outputs[1]


@contextmanager
def local_ray() -> Iterator[None]:
    """A Ray of our own on this machine; no process of it outlives the block."""
    with tempfile.TemporaryDirectory(prefix="arl-ray-", ignore_cleanup_errors=True) as folder:
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=2**29, _temp_dir=folder
        )
        try:
            yield
        finally:
            started = psutil.Process().children(recursive=True)
            ray.shutdown()
            for process in psutil.wait_procs(started, timeout=20)[1]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()


class Clock:
    """Seconds and CPU seconds from its making on, of this process and of those that Ray runs under it."""

    def __init__(self) -> None:
        self._others = self._read_others()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    @staticmethod
    def _read_others() -> dict[psutil.Process, tuple[str, float]]:
        """Process -> role and CPU seconds so far."""
        seen: dict[psutil.Process, tuple[str, float]] = {}
        for process in psutil.Process().children(recursive=True):
            try:
                title, times = process.cmdline()[0], process.cpu_times()
            except (psutil.Error, IndexError):  # it has just ended
                continue
            role = next((role for name, role in ROLES.items() if title.startswith(f"ray::{name}")), "ray")
            seen[process] = role, times.user + times.system
        return seen

    def read(self, turns: int) -> dict[str, Any]:
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        beside: dict[str, float] = {}
        for process, (role, seconds) in self._read_others().items():
            beside[role] = beside.get(role, 0.0) + seconds - self._others.get(process, (role, 0.0))[1]
        if "worker" in beside:  # the loops are there
            beside["driver"], cpu = cpu, beside.pop("worker")
        return {"turns": turns, "wall_s": wall, "cpu_s": cpu} | ({"beside_cpu_s": beside} if beside else {})


# ---- the rows


def make_config(**rollout: Any) -> Any:
    """verl's for PPO, with what all rows need and these values of its rollout."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer")
    values = {"prompt_length": 4096, "response_length": 8192} | rollout
    with open_dict(config):
        config.actor_rollout_ref.rollout.update(values)
        multi_turn = config.actor_rollout_ref.rollout.multi_turn
        multi_turn.format, multi_turn.max_assistant_turns = "hermes", TURNS + 1
        config.data.tool_config_path = None
    return config


def make_worker_config(folder: str) -> Any:
    config = make_config(
        prompt_length=PROMPT_TOKENS + 128, response_length=TURNS * (TURN_TOKENS + 40), calculate_log_probs=True, **SERVERS
    )
    rollout = config.actor_rollout_ref.rollout
    rollout.agent.num_workers, rollout.agent.default_agent_loop = 1, "tool_agent"
    rollout.multi_turn.function_tool_path = str(Path(__file__).resolve())
    # The worker reads the kind of model from here; one that verl has no builder of its own for, as in the other rows.
    (Path(folder) / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    config.actor_rollout_ref.model.path = folder
    return config


def make_loop(config: Any, tokenizer: Any, client: Any) -> ToolAgentLoop:
    return ToolAgentLoop(
        trainer_config=DictConfigWrap(config=config), server_manager=client, tokenizer=tokenizer, processor=None,
        dataset_cls=RLHFDataset, data_config=DictConfigWrap(config=config.data), tools=ToolListWrap([get_function_tool("echo")]),
    )  # fmt: skip


def prompt_text(tokenizer: Any) -> str:
    word = " marbles"
    per_word = len(tokenizer.encode(word * 64, add_special_tokens=False)) / 64
    return word * int((PROMPT_TOKENS - 130) / per_word)


async def run_loops(loop: ToolAgentLoop, text: str, in_flight: int, episodes: int) -> dict[str, Any]:
    numbers, turns = iter(range(episodes)), 0

    async def worker() -> None:
        nonlocal turns
        for number in numbers:
            messages = [{"role": "user", "content": f"{number // 8 % 100:02d} {text}"}]
            output = await loop.run({"temperature": 1.0}, raw_prompt=messages, extra_info={}, tools_kwargs={})
            assert sum(output.response_mask) == TURNS * TURN_TOKENS, sum(output.response_mask)
            turns += TURNS

    await loop.run({"temperature": 1.0}, raw_prompt=[{"role": "user", "content": "00 " + text}], extra_info={}, tools_kwargs={})
    clock = Clock()
    async with asyncio.TaskGroup() as group:
        for _ in range(in_flight):
            group.create_task(worker())
    return clock.read(turns)


async def loop_alone(url: str, in_flight: int, episodes: int, folder: str) -> dict[str, Any]:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        loop = make_loop(make_config(), tokenizer, DirectClient(url, session))
        return await run_loops(loop, prompt_text(tokenizer), in_flight, episodes)


async def loop_over_ray(url: str, in_flight: int, episodes: int, folder: str) -> dict[str, Any]:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    config = make_config(**SERVERS)
    InstantReplica.outputs = fetch_outputs(url)
    servers = await InstantServerManager.create(config)
    loop = make_loop(config, tokenizer, servers.get_client())
    return await run_loops(loop, prompt_text(tokenizer), in_flight, episodes)


async def worker_over_ray(url: str, in_flight: int, episodes: int, folder: str) -> dict[str, Any]:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    config = make_worker_config(folder)
    InstantReplica.outputs = fetch_outputs(url)
    servers = await InstantServerManager.create(config)
    manager = await AgentLoopManager.create(config, servers.get_client())
    text = prompt_text(tokenizer)

    async def batch(numbers: range) -> None:
        prompts = np.empty(len(numbers), dtype=object)
        prompts[:] = [[{"role": "user", "content": f"{number // 8 % 100:02d} {text}"}] for number in numbers]
        output = await manager.generate_sequences(DataProto.from_dict(non_tensors={"raw_prompt": prompts}))
        sampled = int(output.batch["response_mask"].sum())
        assert sampled == len(numbers) * TURNS * TURN_TOKENS, sampled

    await batch(range(1))
    clock = Clock()
    for start in range(0, episodes, in_flight):
        await batch(range(start, min(start + in_flight, episodes)))
    return clock.read(episodes * TURNS)


def main(url: str, in_flight: str, episodes: str, folder: str, mode: str = "") -> None:
    try:
        import uvloop

        run = uvloop.run
    except ImportError:
        run = asyncio.run
    arguments = url, int(in_flight), int(episodes)
    if not mode:
        result = run(loop_alone(*arguments, folder))
    else:
        side = {"--ray": loop_over_ray, "--worker": worker_over_ray}[mode]
        with local_ray(), tempfile.TemporaryDirectory(prefix="arl-verl-") as model:
            shutil.copytree(folder, model, dirs_exist_ok=True)
            result = run(side(*arguments, model))
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
