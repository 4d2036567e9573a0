"""``verifiers`` (its ``ToolEnv``) on the episodes of ``bench/orchestrator.py``; run by it in an environment that has verifiers.

    python bench/peers/run_verifiers.py URL IN_FLIGHT EPISODES TOKENIZER_DIR

It speaks to the server's chat completions with the OpenAI client, as it always does. Prints one line of JSON.
"""

import asyncio
import itertools
import json
import os
import sys
import time
from typing import Any

import verifiers as vf
from datasets import Dataset
from verifiers.types import ClientConfig

TURNS = 5
_ECHOES = itertools.count()


async def echo(text: str) -> str:
    """Say it again.

    Args:
        text: what to say.
    """
    return f"{text} {next(_ECHOES) % 100_000:05d}"


def always(**_: Any) -> float:
    return 1.0


async def main(url: str, in_flight: int, episodes: int) -> dict[str, float]:
    text = " marbles" * 2000
    rows = [{"question": f"{n // 8 % 100:02d} {text}", "answer": "7"} for n in range(episodes)]
    env = vf.ToolEnv(dataset=Dataset.from_list(rows), tools=[echo], max_turns=TURNS, rubric=vf.Rubric(funcs=[always]))
    os.environ["BENCH_KEY"] = "none"
    client = ClientConfig(api_base_url=f"{url}/v1", api_key_var="BENCH_KEY", max_retries=0)
    inputs: Any = env.get_dataset(n=episodes)
    options: dict[str, Any] = {"client": client, "model": "instant", "sampling_args": {"max_tokens": 512, "logprobs": True}}
    options["max_concurrent"] = in_flight
    wall, cpu = time.perf_counter(), time.process_time()
    results: Any = await env.generate(inputs, **options)
    seconds = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    turns = sum(message["role"] == "assistant" for output in results["outputs"] for message in output["completion"])
    assert turns == TURNS * episodes, f"{turns} turns of {TURNS * episodes}"
    return {"turns": turns, **seconds}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))))
