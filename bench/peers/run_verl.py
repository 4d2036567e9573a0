"""verl's ``ToolAgentLoop`` on the episodes of ``bench/orchestrator.py``; run by it in an environment that has verl.

    python bench/peers/run_verl.py URL IN_FLIGHT EPISODES TOKENIZER_DIR

verl reaches its engines through Ray actors, which need a GPU. Here its loop gets a server client that posts to the instant
server with aiohttp and orjson, which is cheaper than what verl has: what is measured is its loop, tokenizing and tools.
Prints one line of JSON.
"""

import asyncio
import itertools
import json
import sys
import time
from typing import Any

import aiohttp
import orjson
from hydra import compose, initialize_config_module
from omegaconf import open_dict
from transformers import AutoTokenizer
from verl.experimental.agent_loop.agent_loop import DictConfigWrap, ToolListWrap
from verl.experimental.agent_loop.tool_agent_loop import ToolAgentLoop
from verl.tools.function_tool import function_tool, get_function_tool
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.workers.rollout.replica import TokenOutput

PROMPT_TOKENS, TURN_TOKENS, TURNS = 2048, 512, 5
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
            answer = orjson.loads(await response.read())
        logprobs = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
        return TokenOutput(token_ids=answer["output_ids"], log_probs=logprobs, stop_reason="completed")


def make_loop(tokenizer: Any, client: DirectClient) -> ToolAgentLoop:
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer")
    with open_dict(config):
        rollout = config.actor_rollout_ref.rollout
        rollout.prompt_length, rollout.response_length = 4096, 8192
        rollout.multi_turn.format, rollout.multi_turn.max_assistant_turns = "hermes", TURNS + 1
        config.data.tool_config_path = None
    tools = ToolListWrap([get_function_tool("echo")])
    return ToolAgentLoop(
        trainer_config=DictConfigWrap(config=config), server_manager=client, tokenizer=tokenizer, processor=None,
        dataset_cls=RLHFDataset, data_config=DictConfigWrap(config=config.data), tools=tools,
    )  # fmt: skip


async def main(url: str, in_flight: int, episodes: int, folder: str) -> dict[str, float]:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        loop = make_loop(tokenizer, DirectClient(url, session))
        word = " marbles"
        per_word = len(tokenizer.encode(word * 64, add_special_tokens=False)) / 64
        text = word * int((PROMPT_TOKENS - 130) / per_word)
        numbers, turns = iter(range(episodes)), 0

        async def worker() -> None:
            nonlocal turns
            for number in numbers:
                messages = [{"role": "user", "content": f"{number // 8 % 100:02d} {text}"}]
                output = await loop.run({"temperature": 1.0}, raw_prompt=messages, extra_info={}, tools_kwargs={})
                assert sum(output.response_mask) == TURNS * TURN_TOKENS, sum(output.response_mask)
                turns += TURNS

        await loop.run(
            {"temperature": 1.0}, raw_prompt=[{"role": "user", "content": "00 " + text}], extra_info={}, tools_kwargs={}
        )
        wall, cpu = time.perf_counter(), time.process_time()
        async with asyncio.TaskGroup() as group:
            for _ in range(in_flight):
                group.create_task(worker())
        return {"turns": turns, "wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


if __name__ == "__main__":
    try:
        import uvloop

        run = uvloop.run
    except ImportError:
        run = asyncio.run
    print(json.dumps(run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))))
