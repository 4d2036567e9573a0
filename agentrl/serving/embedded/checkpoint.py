"""Read a checkpoint for a model that is serving: everything that can be wrong is found before a weight is touched."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from agentrl.errors import WeightSyncError
from agentrl.weights.digest import weights_digest

_ARCHITECTURE_KEYS = (
    "model_type",
    "head_dim",
    "hidden_act",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    "vocab_size",
)
"""config.json keys that tensor shapes do not give away; a difference makes the weights another model's."""

ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_PREFIX = "base_model.model."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"

_SHOWN = 5  # names an error lists before it only counts


@dataclass(frozen=True, slots=True)
class Staged:
    """A checkpoint in memory, checked, ready to be copied into the model."""

    path: Path
    digest: str
    tensors: Mapping[str, Tensor]


def read_layout(dir: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the directory's tensors, from the files' headers alone.

    Raises:
        WeightSyncError: no readable safetensors file, or one name in two files.
    """
    files = sorted(dir.glob("*.safetensors"))
    if not files:
        raise WeightSyncError(f"{dir} holds no *.safetensors file. Give a Hugging Face directory.")
    layout: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                    if name in layout:
                        raise WeightSyncError(f"{file} repeats tensor {name} of another file: remove the stale file.")
                    layout[name] = tuple(tensors.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise WeightSyncError(f"{file} is not a complete safetensors file ({error}): write it anew.") from error
    return layout


class CheckpointReader:
    """Knows what fits into one model.

    Args:
        model: the serving model; only its names, shapes and config are read.
        source: the directory it was loaded from. Later checkpoints must have that one's tensors, names and shapes alike.
    """

    def __init__(self, model: Any, source: Path) -> None:
        self._model = model
        self._source = source
        self._config = _read_config(source)
        self._layout = read_layout(source)
        state: dict[str, Tensor] = model.state_dict()
        owners: dict[tuple[int, tuple[int, ...]], str] = {}
        self._aliases: dict[str, str] = {}
        """Tied names, e.g. ``lm_head.weight`` -> ``model.embed_tokens.weight``."""
        for name, tensor in state.items():
            owner = owners.setdefault((tensor.data_ptr(), tuple(tensor.shape)), name)
            if owner != name:
                self._aliases[name] = owner
        self._shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if name not in self._aliases}
        stored = {name: shape for name, shape in self._layout.items() if name not in self._aliases}
        self._is_direct = stored == self._shapes
        """Whether files carry the model's own names. If not, transformers must translate them (fused experts and the like)."""

    def stage(self, dir: str | Path, *, expected_digest: str | None = None) -> Staged:
        """Read and check a checkpoint.

        Args:
            dir: Hugging Face directory with the tensors of the directory the model came from, or a peft directory with a LoRA
                adapter for that one, which is merged into its weights.
            expected_digest: what `weights_digest` must say of it.

        Raises:
            WeightSyncError: the directory is missing, torn, of another shape, of another digest, or holds a number that
                is not finite.
        """
        path = Path(dir)
        if not path.is_dir():
            raise WeightSyncError(f"model_path={str(dir)!r} is not a directory on this machine.")
        is_adapter = (path / ADAPTER_CONFIG).is_file()
        if not is_adapter:
            self._check_layout(path, read_layout(path))
            self._check_config(path)
        digest = weights_digest(path)
        if expected_digest is not None and digest != expected_digest:
            raise WeightSyncError(
                f"{path} has digest {digest}, expected {expected_digest}: it holds other weights. Nothing was loaded."
            )
        read = self._merge if is_adapter else self._read if self._is_direct else self._translate
        tensors = read(path)
        broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
        if broken:
            raise WeightSyncError(f"{path} holds NaN or infinity in {_some(broken)}: the training step that wrote it diverged.")
        return Staged(path, digest, tensors)

    def _check_layout(self, path: Path, layout: Mapping[str, tuple[int, ...]]) -> None:
        optional = set(self._aliases)
        missing = sorted(set(self._layout) - set(layout) - optional)
        unknown = sorted(set(layout) - set(self._layout) - optional)
        if missing or unknown:
            raise WeightSyncError(f"{path} is a checkpoint of another model: missing {_some(missing)}; unknown {_some(unknown)}.")
        for name, shape in layout.items():
            expected = self._layout.get(name) or self._shapes[self._aliases[name]]
            if shape != expected:
                raise WeightSyncError(f"{path}: tensor {name} has shape {list(shape)}, the model needs {list(expected)}.")

    def _check_config(self, path: Path) -> None:
        if not (path / "config.json").exists():
            return
        config = _read_config(path)
        for key in _ARCHITECTURE_KEYS:
            if key in config and key in self._config and config[key] != self._config[key]:
                raise WeightSyncError(
                    f"{path / 'config.json'} says {key}={config[key]!r}, the serving model has {self._config[key]!r}: "
                    "start a new server for another architecture."
                )

    def _read(self, path: Path) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for file in sorted(path.glob("*.safetensors")):
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118 (not a mapping)
                    tensors[name] = stored.get_tensor(name)
        for alias in [name for name in tensors if name in self._aliases]:
            owner, tied = self._aliases[alias], tensors.pop(alias)
            if owner not in tensors:
                tensors[owner] = tied
            elif not torch.equal(tied, tensors[owner]):
                raise WeightSyncError(f"{path}: {alias} differs from {owner}, but the serving model ties them into one tensor.")
        return tensors

    def _merge(self, path: Path) -> dict[str, Tensor]:
        """The starting weights W plus scale * B @ A for every adapted matrix, in fp32 and then in W's dtype (arXiv:2106.09685)."""
        if not self._is_direct:
            raise WeightSyncError(
                f"{path}: adapters need a checkpoint with the model's own tensor names. Publish merged weights."
            )
        config = _read_config(path, ADAPTER_CONFIG)
        rank, alpha = config.get("r"), config.get("lora_alpha")
        if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
            raise WeightSyncError(f"{path / ADAPTER_CONFIG} says r={rank!r} and lora_alpha={alpha!r}: two numbers are needed.")
        for name in ("use_rslora", "use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save"):
            if config.get(name):
                raise WeightSyncError(f"{path / ADAPTER_CONFIG} sets {name}: not supported here. Publish merged weights.")
        read_layout(path)
        parts: dict[str, Tensor] = {}
        for file in sorted(path.glob("*.safetensors")):
            with safe_open(file, framework="pt") as stored:
                parts |= {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a mapping)
        tensors = self._read(self._source)
        scale, used = float(alpha) / rank, 0
        for name, value in tensors.items():
            stem = f"{_ADAPTER_PREFIX}{name.removesuffix('.weight')}"
            down, up = parts.get(f"{stem}{_DOWN}"), parts.get(f"{stem}{_UP}")
            if down is None or up is None:
                continue
            if (up.shape[0], down.shape[1]) != tuple(value.shape) or up.shape[1] != down.shape[0]:
                raise WeightSyncError(
                    f"{path}: the adapter of {name} has shapes {list(up.shape)} and {list(down.shape)}, W {list(value.shape)}."
                )
            tensors[name] = (value.float() + scale * (up.float() @ down.float())).to(value.dtype)
            used += 2
        if used == 0 or used != len(parts):
            raise WeightSyncError(f"{path}: {len(parts) - used} of {len(parts)} adapter tensors fit no weight of {self._source}.")
        return tensors

    def _translate(self, path: Path) -> dict[str, Tensor]:
        fresh: Any = type(self._model).from_pretrained(path, dtype=self._model.dtype)
        return {name: tensor for name, tensor in fresh.state_dict().items() if name in self._shapes}


@torch.no_grad()
def copy_into(model: Any, staged: Staged) -> None:
    """Overwrite the model's weights. Call it where no forward pass can run at the same time."""
    state: dict[str, Tensor] = model.state_dict()
    for name, tensor in staged.tensors.items():
        state[name].copy_(tensor)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _read_config(dir: Path, name: str = "config.json") -> dict[str, Any]:
    try:
        config = json.loads((dir / name).read_text())
    except (OSError, ValueError) as error:
        raise WeightSyncError(f"{dir / name} cannot be read ({error}).") from error
    return dict(config)


def _some(names: list[str]) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
