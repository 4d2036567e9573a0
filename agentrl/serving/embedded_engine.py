"""A small inference server with SGLang's HTTP subset over transformers continuous batching; runs on a CPU or a GPU.

    python -m agentrl.serving.embedded_engine --model-path DIR --port 0

prints ``LISTENING http://HOST:PORT`` on stdout when it accepts requests. It lives until SIGTERM, until ``--parent-pid``
is gone, or until its engine thread dies (exit code 1).
"""

import argparse
import json
import logging
import os
import select
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import uvicorn
from fastapi import FastAPI

from agentrl.errors import AgentRLError, ConfigError
from agentrl.process import KEEP_ALIVE_S
from agentrl.serving.embedded.checkpoint import CheckpointReader
from agentrl.serving.embedded.continuous_batching import ContinuousBatch
from agentrl.serving.embedded.engine import Engine
from agentrl.serving.embedded.http import RATE_LIMIT, create_app
from agentrl.weights.digest import weights_digest

logger = logging.getLogger(__name__)

SHUTDOWN_GRACE_S = 2
API_KEY_VARIABLE = "AGENTRL_ENGINE_API_KEY"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m agentrl.serving.embedded_engine", description=__doc__)
    parser.add_argument("--model-path", required=True, type=Path, help="Hugging Face directory (safetensors)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", default=0, type=int, help="0 takes a free one")
    parser.add_argument("--weight-version", default="default", help="label of the weights it starts with")
    parser.add_argument("--max-running-requests", default=32, type=int, help="requests per forward pass; the rest queue")
    parser.add_argument("--max-batch-tokens", default=128, type=int, help="tokens per forward pass")
    parser.add_argument("--page-size", default=16, type=int, help="tokens per cache block")
    parser.add_argument("--num-blocks", default=512, type=int, help="cache blocks")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="float32", choices=sorted(_DTYPES))
    parser.add_argument(
        "--api-key",
        default=os.environ.get(API_KEY_VARIABLE),
        help=f"bearer token that every route but health and metrics wants; better given as {API_KEY_VARIABLE}, which `ps` does not show",
    )
    parser.add_argument("--seed", default=None, type=int, help="of the sampler")
    parser.add_argument(
        "--weights-root", action="append", default=[], type=Path,
        help="folder that weight updates may come from, besides --model-path; repeat for more, none allows any",
    )  # fmt: skip
    parser.add_argument("--rate-limit", default=RATE_LIMIT, type=float, help="requests per second and client; 0 is none")
    parser.add_argument("--parent-pid", default=None, type=int, help="exit when this process is gone")
    parser.add_argument("--incremental-streaming-output", action="store_true", help="stream deltas, not everything so far")
    parser.add_argument("--log-level", default="warning")
    return parser.parse_args(argv)


def load_model(path: Path, *, device: str, dtype: str) -> Any:
    """The causal LM of a Hugging Face directory, in ``eval`` mode, with SDPA attention."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if not path.is_dir():
        raise ConfigError(f"--model-path {path} is not a directory: give a Hugging Face directory on this machine.")
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=_DTYPES[dtype], attn_implementation="sdpa")
    return model.to(device).eval()


def build(args: argparse.Namespace) -> tuple[Engine, FastAPI]:
    """Load the model and wire engine and application; the engine is started."""
    model = load_model(args.model_path, device=args.device, dtype=args.dtype)
    batch = ContinuousBatch(
        model,
        max_running_requests=args.max_running_requests,
        max_batch_tokens=args.max_batch_tokens,
        page_size=args.page_size,
        num_blocks=args.num_blocks,
        seed=args.seed,
    )
    engine = Engine(
        model,
        batch,
        CheckpointReader(model, args.model_path),
        weight_version=args.weight_version,
        model_path=str(args.model_path),
        weights_digest=weights_digest(args.model_path),
    )
    config = model.config.get_text_config()
    public_args = {key: value for key, value in vars(args).items() if key != "api_key"}
    app = create_app(
        engine,
        vocab_size=int(model.get_input_embeddings().num_embeddings),
        max_context_tokens=min(int(config.max_position_embeddings), batch.capacity_tokens),
        eos_ids=eos_token_ids(args.model_path),
        max_running_requests=args.max_running_requests,
        model_facts={
            "tokenizer_path": str(args.model_path),
            "is_generation": True,
            "model_type": model.config.model_type,
            "architectures": model.config.architectures,
            "load_format": "auto",
        },
        server_args={key: str(value) if isinstance(value, Path) else value for key, value in public_args.items()},
        api_key=args.api_key,
        incremental_streaming=args.incremental_streaming_output,
        rate_limit=args.rate_limit or None,
        weights_roots=[args.model_path, *args.weights_root] if args.weights_root else [],
    )
    engine.start()
    return engine, app


def eos_token_ids(path: Path) -> tuple[int, ...]:
    """Every id that ends a generation, from ``generation_config.json`` and ``config.json``."""
    found: dict[int, None] = {}
    for name in ("generation_config.json", "config.json"):
        file = path / name
        if file.exists():
            value = json.loads(file.read_text()).get("eos_token_id")
            found |= dict.fromkeys(value if isinstance(value, list) else [] if value is None else [value])
    return tuple(found)


class _Server(uvicorn.Server):
    """Says where it listens once it does."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            sys.stdout.write(f"LISTENING http://{host}:{port}\n")
            sys.stdout.flush()


def _exit_with(pid: int, server: uvicorn.Server) -> None:
    """Wait until the process is gone, then stop the server; by force when that takes too long."""
    try:
        handle = os.pidfd_open(pid)  # also notices a parent that is dead but not yet reaped
    except ProcessLookupError:
        pass
    except (AttributeError, OSError):
        while os.getppid() == pid or psutil.pid_exists(pid):
            time.sleep(0.5)
    else:
        select.select([handle], [], [])
    logger.warning("parent is gone pid=%d: exiting", pid)
    server.should_exit = True
    time.sleep(SHUTDOWN_GRACE_S + 3)
    os._exit(0)


def serve(args: argparse.Namespace) -> int:
    """Serve until told to stop; returns the exit code."""
    try:
        listener = socket.create_server((args.host, args.port), backlog=2048)
    except OSError as error:
        raise ConfigError(f"cannot listen on {args.host}:{args.port} ({error}): choose another port, or 0.") from error
    engine, app = build(args)
    config = uvicorn.Config(
        app, http="h11", log_level=args.log_level, access_log=False, lifespan="off", timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=SHUTDOWN_GRACE_S,
    )  # fmt: skip
    server = _Server(config)

    def stop_serving() -> None:
        server.should_exit = True

    engine.on_failure = stop_serving
    if args.parent_pid is not None:
        threading.Thread(target=_exit_with, args=(args.parent_pid, server), name="parent-watch", daemon=True).start()
    try:
        server.run(sockets=[listener])
    finally:
        engine.stop()
    return 0 if engine.failure is None else 1


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(level=args.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    try:
        return serve(args)
    except AgentRLError as error:
        sys.stderr.write(f"embedded engine: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
