"""A scripted engine as a process of its own; takes SGLang's flags. ``CHAOS_SCRIPT`` names the script."""

import argparse
import asyncio
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from chaos_script import Script

from agentrl.testing.fake_sglang import BASE_LABEL, FakeSGLang


async def serve(port: int, label: str) -> None:
    script = Script.load(Path(os.environ["CHAOS_SCRIPT"]))
    latency_s = float(os.environ.get("CHAOS_TOKEN_S", "0.002"))
    async with FakeSGLang(port=port, label=label, token_latency_s=latency_s, sampler=script):
        await asyncio.get_running_loop().create_future()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--weight-version", default=BASE_LABEL)
    args, _ = parser.parse_known_args()
    asyncio.run(serve(args.port, args.weight_version))
