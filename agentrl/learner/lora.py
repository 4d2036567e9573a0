"""Low-rank adapters through peft (LoRA, arXiv:2106.09685): train little, publish whole weights.

Engines get merged weights, so every engine that loads a Hugging Face directory serves them; the adapters themselves are written
beside them in peft's own format. With the adapters switched off the model *is* the starting policy: a reference for the
KL that costs no memory.
"""

import dataclasses
import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from agentrl.errors import ConfigError

ADAPTER = "default"
_DOWN, _UP = f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """Which matrices get an adapter, and how large it is."""

    rank: int
    alpha: float | None = None
    """The adapter's product is scaled by alpha / rank; None: alpha = 2 * rank."""
    targets: tuple[str, ...] = ()
    """Names of linear layers, such as ``q_proj``; empty: all but the LM head."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"lora: rank={self.rank} must be at least 1.")

    @property
    def scale(self) -> float:
        return (self.alpha if self.alpha is not None else 2.0 * self.rank) / self.rank


def add_adapters(hf: Any, settings: LoraSettings) -> None:
    """Put adapters beside the chosen linear layers, in place; everything else is frozen. They start at zero effect.

    Raises:
        ConfigError: peft is not installed, or no layer has such a name.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("learn.lora needs peft: pip install peft") from error
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.scale * settings.rank,  # pyright: ignore[reportArgumentType]  # peft takes floats
        target_modules=list(settings.targets) or "all-linear", lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
    )  # fmt: skip
    hf.requires_grad_(False)
    try:
        # The same random adapters on every rank and in every start, whatever was drawn before.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            inject_adapter_in_model(config, hf, adapter_name=ADAPTER)
    except ValueError as error:
        raise ConfigError(f"lora: targets={list(settings.targets)} fit no layer of {type(hf).__name__}: {error}") from error


@contextmanager
def adapters_off(model: nn.Module) -> Generator[None]:
    """The model without its adapters: the policy that training started from."""
    from peft.tuners.lora import LoraLayer

    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    # Not enable_adapters(): that toggles requires_grad, which FSDP fixed when it sharded the parameters.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merge_adapters(state: Mapping[str, Tensor], settings: LoraSettings) -> dict[str, Tensor]:
    """The state dict of a plain model: W + scale * B @ A, in fp32 and then in W's dtype."""
    merged: dict[str, Tensor] = {}
    for name, value in state.items():
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        prefix = plain.removesuffix(".weight")
        if plain != name and name.endswith(".weight"):
            down, up = state[f"{prefix}{_DOWN}"].float(), state[f"{prefix}{_UP}"].float()
            value = (value.float() + settings.scale * (up @ down)).to(value.dtype)
        merged[plain] = value
    return merged


def write_adapters(directory: Path, state: Mapping[str, Tensor], hf: Any, settings: LoraSettings) -> None:
    """The adapters alone, as ``PeftModel.from_pretrained`` reads them."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    adapters = {
        f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": value.to(torch.float32).contiguous()
        for name, value in state.items()
        if ".lora_" in name
    }
    save_file(adapters, str(directory / "adapter_model.safetensors"), metadata={"format": "pt"})
    used: LoraConfig = hf.peft_config[ADAPTER] if hasattr(hf, "peft_config") else LoraConfig(r=settings.rank)
    described = {key: _plain(value) for key, value in dataclasses.asdict(used).items()}
    described.pop("runtime_config", None)
    described["base_model_name_or_path"] = str(getattr(hf.config, "_name_or_path", "") or "")
    (directory / "adapter_config.json").write_text(json.dumps(described, indent=2, sort_keys=True, default=str))


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value
