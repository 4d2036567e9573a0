"""``agentrl sft``: the cold start, with the learner's own machinery."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from agentrl.assembly.parts import LEARNER_DTYPE, run_dir_of
from agentrl.config import Config
from agentrl.data.conversations import read_conversations
from agentrl.errors import ConfigError

log = logging.getLogger(__name__)

LOG_EVERY = 20


def run_sft_from_config(
    config: Config,
    *,
    model_path: str | None = None,
    steps: int | None = None,
    on_step: Callable[[Mapping[str, float]], None] | None = None,
) -> Path:
    """Supervised steps on ``data.sft``; returns the folder of the trained model.

    Raises:
        ConfigError: the config names no conversations or no model.
    """
    from agentrl.learner.sft import run_sft

    if not config.data.sft:
        raise ConfigError(
            "data.sft is empty: give a JSONL file of conversations, for example from `agentrl data prepare gsm8k --sft`"
        )
    path = model_path or config.model.path
    if not path:
        raise ConfigError("model.path is empty: give the model to start from")
    out = Path(config.sft.out) if config.sft.out else run_dir_of(config).create().root / "sft"
    s = config.sft
    run_sft(
        Path(path),
        list(read_conversations(Path(config.data.sft))),
        out_dir=out,
        steps=steps or s.steps,
        batch_size=s.batch,
        lr=s.lr,
        betas=(s.betas[0], s.betas[1]),
        weight_decay=s.weight_decay,
        warmup_steps=s.warmup_steps,
        decay_fraction=s.decay_fraction,
        max_grad_norm=s.grad_clip,
        micro_batch_tokens=s.micro_tokens,
        shuffle=s.shuffle,
        seed=config.run.seed,
        dtype=LEARNER_DTYPE[config.model.dtype],
        on_step=on_step or _log_step,
    )
    return out


def _log_step(metrics: Mapping[str, float]) -> None:
    if int(metrics["step"]) % LOG_EVERY == 0:
        log.info("sft step=%d loss=%.4f tokens_per_s=%.0f", metrics["step"], metrics["sft/loss"], metrics["perf/throughput"])
