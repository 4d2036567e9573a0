"""The policy: load a Hugging Face causal LM, shard it with FSDP2, run packed rows through it, write it back as a directory.

FSDP2 wraps every decoder layer and then the whole, for any world size including one, so that a laptop and a cluster run the
same code. The LM head is applied inside `PolicyModel.forward`, only where a token's logprob is wanted.
"""

import logging
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from agentrl.errors import ConfigError
from agentrl.learner.attention import PACKED
from agentrl.learner.compiled import compile_layers
from agentrl.learner.distributed import Team
from agentrl.learner.logprobs import predictor_index, token_logprobs, token_squares
from agentrl.learner.lora import LoraSettings, add_adapters, merge_adapters, write_adapters
from agentrl.learner.packing import PackedRow, pack_row
from agentrl.learner.sequence_parallel import SequenceGroup, check_heads, cut, joined

logger = logging.getLogger(__name__)

MAX_SHARD_BYTES = 5_000_000_000
"""Weight files are split beyond this, as the Hub recommends."""

PACKING_TOLERANCE = 1e-3
"""Largest accepted difference of a logprob between packed and separate, in fp32; a missing block mask is off by more than 1."""
PACKING_TOLERANCE_HALF = 0.25
"""The same in bf16, whose logits carry about 8 bits."""

# What transforms logits behind the LM head in some families; our chunked head would silently leave it out.
_LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling")

STATIC_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.model")
"""Files of a model directory that training never changes."""


class PolicyModel(nn.Module):
    """A causal LM that answers one question: how likely were these tokens? (Letters: N tokens in a row, M asked for.)"""

    def __init__(
        self,
        hf: Any,
        *,
        temperature: float = 1.0,
        chunk_size: int = 1024,
        lora: LoraSettings | None = None,
        sequence: SequenceGroup | None = None,
    ) -> None:
        super().__init__()
        self.hf = hf
        self.sequence = sequence
        self.temperature = temperature
        self.chunk_size = chunk_size
        self.lora = lora

    @property
    def layers(self) -> Any:
        """The decoder layers, each a unit of sharding."""
        return getattr(self.hf.base_model, "layers", ())

    def forward(
        self,
        ids: Tensor,  # [N] int64
        position_ids: Tensor,  # [N] int64, restarting at 0 for each sequence
        cu_seqlens: Tensor,  # [S + 1] int32
        max_length: int,
        loss_positions: Tensor,  # [M] int64, tokens whose logprob is wanted; never a sequence's first
        also: Literal["entropy", "squares"] | None = "entropy",
    ) -> tuple[Tensor, Tensor]:  # [M] fp32 logprobs; [M] fp32 entropies, or sums of squared probabilities, or zeros
        wanted = predictor_index(loss_positions, position_ids)
        hidden, own = predictor_states(self.hf, ids, position_ids, cu_seqlens, max_length, wanted, self.sequence)
        targets = ids[loss_positions]
        if own is not None:
            targets = targets[own]
        found = hidden, self.hf.get_output_embeddings().weight, targets
        options: dict[str, Any] = {"temperature": self.temperature, "chunk_size": self.chunk_size}
        logprobs, others = (
            token_squares(*found, **options)
            if also == "squares"
            else token_logprobs(*found, **options, with_entropy=also == "entropy")
        )
        if self.sequence is None or own is None:
            return logprobs, others
        return joined(logprobs, own, len(wanted), self.sequence), joined(others, own, len(wanted), self.sequence)


def predictor_states(
    hf: Any,
    ids: Tensor,  # [N] int64
    position_ids: Tensor,  # [N] int64
    cu_seqlens: Tensor,
    max_length: int,
    wanted: Tensor,  # [M] int64 places in the row
    sequence: SequenceGroup | None,
) -> tuple[Tensor, Tensor | None]:  # [m, H]; [m] int64, or None for all of them
    """Hidden states at the wanted places of a packed row that this rank has, before the head, and which of the M they are."""
    if sequence is None:
        return hidden_states(hf, ids, position_ids, cu_seqlens, max_length)[wanted], None
    stretch = cut(ids, position_ids, cu_seqlens, max_length, sequence)
    own = stretch.holds(wanted).nonzero()[:, 0]
    hidden = hidden_states(hf, stretch.ids, stretch.position_ids, stretch.cu_seqlens, stretch.max_length, sequence)
    return hidden[wanted[own] - stretch.start], own


def hidden_states(
    hf: Any, ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, max_length: int, sequence: SequenceGroup | None = None
) -> Tensor:
    """[N, H] of a packed row, before the head; with a sequence group, of this rank's stretch of it."""
    packed: dict[str, Any] = {}
    if hf.config._attn_implementation == PACKED:
        packed = {"cu_seqlens": cu_seqlens, "max_length": max_length, "sequence": sequence}
    # use_cache=False is load-bearing: with a cache transformers drops the sequence boundaries without a word.
    return hf.base_model(input_ids=ids[None], position_ids=position_ids[None], use_cache=False, **packed).last_hidden_state[0]


def load_policy(
    path: str | Path,
    team: Team,
    *,
    dtype: Literal["fp32", "bf16"] = "fp32",
    temperature: float = 1.0,
    chunk_size: int = 1024,
    gradient_checkpointing: bool = False,
    trainable: bool = True,
    lora: LoraSettings | None = None,
    offload: bool = False,
    compiled: bool = False,
) -> PolicyModel:
    """Load and shard a policy; ``bf16`` computes in bf16 over fp32 master weights.

    Args:
        temperature: the sampler's, so that logprobs are of the same distribution.
        chunk_size: tokens whose logits exist at a time.
        gradient_checkpointing: keep only layer inputs and compute the rest again in backward.
        trainable: False for a frozen reference model.
        lora: train low-rank adapters and freeze everything else.
        offload: keep shards, gradients and optimizer state in host memory (slow; for models that do not fit).
        compiled: ``torch.compile`` the decoder layers.

    Raises:
        ConfigError: the directory holds no causal LM, or one whose logits this learner would get wrong; or nothing can be compiled.
    """
    hf = load_causal_lm(path, sequence=team.sequence)
    if gradient_checkpointing:
        hf.activation_checkpointing_enable({"use_reentrant": False})
    disable_dropout(hf)
    if not trainable:
        hf.requires_grad_(False)
    if lora is not None:
        add_adapters(hf, lora)
    policy = PolicyModel(hf, temperature=temperature, chunk_size=chunk_size, lora=lora, sequence=team.sequence)
    place(policy, team, offload=offload)
    policy.train()  # transformers checkpoints activations only in train mode
    if compiled:
        compile_layers(policy.layers, team.device)
    shard(policy, policy.layers, team, dtype=dtype, offload=offload)
    return policy


def place(model: nn.Module, team: Team, *, offload: bool) -> None:
    """Bring a model to its device before it is sharded; with ``offload`` only its buffers, which FSDP leaves where they are."""
    if not offload:
        model.to(team.device)
        return
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(team.device))


def shard(model: nn.Module, layers: Any, team: Team, *, dtype: Literal["fp32", "bf16"] = "fp32", offload: bool = False) -> None:
    """FSDP2 over all ranks, those that share rows too: one group of parameters per decoder layer, and one for the embeddings, norm and head."""
    mesh = init_device_mesh(team.device.type, (team.world_size,))
    options: dict[str, Any] = {"mesh": mesh}
    if dtype == "bf16":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=team.device.type == "cuda")
    for layer in layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)


def run_row(
    policy: PolicyModel,
    ids: Tensor,
    row: PackedRow,
    loss_positions: Tensor,
    *,
    also: Literal["entropy", "squares"] | None = "entropy",
) -> tuple[Tensor, Tensor]:
    """Logprobs and entropies [M] of a packed row's tokens at ``loss_positions`` [M]; ``ids`` [N] are the row's own."""
    return policy(*row_arguments(ids, row), loss_positions, also)


def row_arguments(ids: Tensor, row: PackedRow) -> tuple[Tensor, Tensor, Tensor, int]:
    """A packed row as a model takes it: ids, positions, sequence boundaries, longest sequence."""
    device = ids.device
    return ids, torch.from_numpy(row.position_ids).to(device), torch.from_numpy(row.cu_seqlens).to(device), row.max_length


@contextmanager
def frozen_passes(policy: nn.Module) -> Generator[None]:
    """Forward passes without a backward.

    FSDP leaves the outermost group gathered after a forward, for the backward that usually follows. Here none does, and whoever
    looked at the parameters next (an optimizer, say) would get temporary full copies instead of the shards.
    """
    try:
        with torch.no_grad():
            yield
    finally:
        cast("Any", policy).reshard()


def empty_pass(policy: PolicyModel, team: Team) -> Tensor:
    """A pass that adds zero to the loss: FSDP's collectives need every rank in every micro-batch."""
    ids = torch.zeros(2, dtype=torch.int64, device=team.device)
    row = pack_row(np.array([0, 2]), [0])
    return run_row(policy, ids, row, torch.ones(1, dtype=torch.int64, device=team.device))[0].sum() * 0.0


def check_packing(policy: PolicyModel, team: Team, *, tolerance: float = PACKING_TOLERANCE) -> float:
    """Run two short sequences packed and apart; returns the largest difference of a logprob.

    Raises:
        ConfigError: they differ, so this architecture looks across sequence boundaries and would train on wrong numbers.
    """
    vocab = int(policy.hf.config.get_text_config().vocab_size)
    ids = torch.randint(0, vocab, (24,), generator=torch.Generator().manual_seed(0)).to(team.device)
    offsets = np.array([0, 11, 24])
    wanted = torch.tensor([*range(1, 11), *range(12, 24)], device=team.device)
    with frozen_passes(policy):
        packed = run_row(policy, ids, pack_row(offsets, [0, 1]), wanted, also=None)[0]
        first = run_row(policy, ids[:11], pack_row(offsets[:2], [0]), wanted[:10], also=None)[0]
        second = run_row(policy, ids[11:], pack_row(np.array([0, 13]), [0]), wanted[10:] - 11, also=None)[0]
    difference = float((packed - torch.cat([first, second])).abs().max())
    if not difference <= tolerance:
        raise ConfigError(
            f"{type(policy.hf).__name__}: packed and separate logprobs differ by {difference:.3g} (tolerance {tolerance:g}): its "
            f"layers look across sequence boundaries. Use an architecture with plain causal attention."
        )
    return difference


def full_state(policy: PolicyModel) -> dict[str, Tensor]:
    """Gather the unsharded weights on rank 0's CPU under Hugging Face's names (empty on other ranks). A collective.

    Adapters are left as they are: see `merge_adapters`.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered = cast("dict[str, Tensor]", get_model_state_dict(policy, options=options))
    tied = _tied_keys(policy)
    return {key: value for name, value in gathered.items() if (key := name.removeprefix("hf.")) not in tied}


def write_hf_directory(
    directory: Path, state: dict[str, Tensor], policy: PolicyModel, *, source: Path | None, dtype: Literal["fp32", "bf16"]
) -> None:
    """Write weights, config, and the tokenizer and chat template of ``source`` unchanged; any tool can load the result.

    LoRA adapters are merged into the weights, and written once more by themselves under ``adapter/`` in peft's format. Nothing is made durable here: the caller syncs and renames.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    if policy.lora is not None:
        write_adapters(directory / "adapter", state, policy.hf, policy.lora)
        state = merge_adapters(state, policy.lora)
    kept = torch.bfloat16 if dtype == "bf16" else torch.float32
    state = {name: value.to(kept).contiguous() if value.is_floating_point() else value for name, value in state.items()}
    shards = split_torch_state_dict_into_shards(state, max_shard_size=MAX_SHARD_BYTES)
    for filename, names in shards.filename_to_tensors.items():
        save_file({name: state[name] for name in names}, str(directory / filename), metadata={"format": "pt"})
    if shards.is_sharded:
        import json

        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
    hf = policy.hf
    config = hf.config.to_dict() | {"architectures": [type(hf).__name__], "dtype": "bfloat16" if dtype == "bf16" else "float32"}
    type(hf.config)(**config).save_pretrained(directory)
    if getattr(hf, "generation_config", None) is not None:
        hf.generation_config.save_pretrained(directory)
    if source is not None:
        copy_static_files(source, directory)


def copy_static_files(source: Path, directory: Path) -> None:
    """Copy tokenizer and template files byte for byte."""
    for pattern in STATIC_FILES:
        for file in sorted(source.glob(pattern)):
            target = directory / file.name
            if file.is_file() and not target.exists():
                shutil.copyfile(file, target)


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for an immutable file; a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def link_tree(source: Path, target: Path) -> None:
    """Every file below ``source`` under its relative name below ``target``, as `link_or_copy`."""
    for file in sorted(source.rglob("*")):
        if file.is_file():
            place = target / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(file, place)


def load_causal_lm(path: str | Path, *, sequence: SequenceGroup | None = None) -> Any:
    """A causal LM in fp32, with packed attention where its layers allow.

    Raises:
        ConfigError: it cannot be read, or this learner would compute it wrongly.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config: Any = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={str(path)!r} holds no Hugging Face model that can be read: {error}") from error
    for name in _LOGIT_TRANSFORMS:
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ConfigError(
                f"model.path={str(path)!r}: its {name}={getattr(config, name)} changes logits behind the LM head, which the "
                f"chunked logprobs leave out. Use a model without it."
            )
    attention = PACKED if _is_plain_causal(config) else "sdpa"
    if sequence is not None:
        if attention != PACKED:
            raise ConfigError(
                f"model.path={str(path)!r}: sequence_parallel={sequence.size} needs layers that attend to everything before a token, "
                f"which those of {config.model_type} do not. Use sequence_parallel=1."
            )
        check_heads(config, sequence.size, path=path)
    hf: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=attention)
    if getattr(hf.get_output_embeddings(), "bias", None) is not None:
        raise ConfigError(f"model.path={str(path)!r}: its LM head has a bias, which the chunked logprobs leave out.")
    return hf


def _is_plain_causal(config: Any) -> bool:
    """Whether every layer attends causally to everything before it, so that packed attention needs no mask."""
    layers = getattr(config, "layer_types", None)
    if layers is not None:
        return all(kind == "full_attention" for kind in layers)
    sliding = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return sliding is None and config.model_type in ("llama", "qwen2", "qwen3", "mistral", "smollm3", "olmo2", "phi3")


def disable_dropout(hf: Any) -> None:
    """With dropout the same weights would give another ratio than 1, so no policy trains with it."""
    modules: list[Any] = list(hf.modules())
    for module in modules:
        for name in ("attention_dropout",) if not isinstance(module, nn.Dropout) else ("p",):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _tied_keys(policy: PolicyModel) -> set[str]:
    """Names that share another name's storage; written once."""
    hf = policy.hf
    if not getattr(hf.config.get_text_config(), "tie_word_embeddings", False):
        return set()
    head = hf.get_output_embeddings()
    return {f"{name}.weight" for name, module in hf.named_modules() if module is head}
