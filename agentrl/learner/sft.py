"""Supervised fine-tuning on conversations with tool calls: the cold start, with the learner's own machinery.

The loss is on exactly the tokens a policy would sample: each assistant turn from behind the generation prompt up to and
including the token that ends it. What the template writes after that (a newline, say) belongs to the observation that
follows, as in a rollout.
"""

import itertools
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from agentrl.errors import DataError, TrainingDiverged
from agentrl.learner.distributed import Team, start_team
from agentrl.learner.durable import replace_directory, sync_tree
from agentrl.learner.model import PolicyModel, empty_pass, full_state, load_policy, run_row, write_hf_directory
from agentrl.learner.optim import OptimizerSettings, build_optimizer, update
from agentrl.learner.packing import pack_row, plan_rows
from agentrl.types import Message

logger = logging.getLogger(__name__)

MAX_NONFINITE_STEPS = 3


class Dialogue(Protocol):
    """A finished conversation."""

    @property
    def messages(self) -> Sequence[Message]: ...

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]: ...


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A rendered conversation. T tokens."""

    ids: NDArray[np.int32]
    """[T]"""
    mask: NDArray[np.bool_]
    """[T] True where the assistant speaks."""


def render_example(tokenizer: Any, dialogue: Dialogue, *, stop_token_ids: Sequence[int] | None = None) -> Example:
    """Render a conversation with its tokenizer's template, turn by turn, and mark what the policy would have sampled.

    Each piece is tokenized by itself, because a policy samples from behind the prompt's last token: no merge crosses that line.

    Args:
        stop_token_ids: tokens that end a turn; None takes the tokenizer's end-of-sequence token.

    Raises:
        DataError: no assistant message, a template that changes what came before, or one that does not end a turn with a stop token.
    """
    stops = [tokenizer.eos_token_id] if stop_token_ids is None else stop_token_ids
    stop_texts = tokenizer.convert_ids_to_tokens(list(stops))
    messages = list(dialogue.messages)
    pieces: list[tuple[str, bool]] = []
    rendered = ""
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(tokenizer, messages[:turn], dialogue.tools, add_generation_prompt=True)
        whole = _render(tokenizer, messages[: turn + 1], dialogue.tools, add_generation_prompt=False)
        if not prompt.startswith(rendered) or not whole.startswith(prompt):
            raise DataError(
                f"the chat template is not prefix-preserving at message {turn}: {_first_difference(rendered, prompt, whole)}. "
                f"Train with a template that only appends."
            )
        reply = whole[len(prompt) :]
        end = max((found + len(text) for text in stop_texts if (found := reply.rfind(text)) >= 0), default=-1)
        if end < 0:
            raise DataError(f"the chat template ends message {turn} without any of {stop_texts}: {reply[-40:]!r}")
        pieces += [(prompt[len(rendered) :], False), (reply[:end], True)]
        rendered = prompt + reply[:end]
    if not pieces:
        raise DataError(f"a conversation of {len(messages)} messages has no assistant message: there is nothing to learn from")
    ids: list[int] = []
    mask: list[bool] = []
    for text, is_sampled in pieces:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += tokens
        mask += [is_sampled] * len(tokens)
    return Example(np.asarray(ids, dtype=np.int32), np.asarray(mask, dtype=np.bool_))


def run_sft(
    model_dir: str | Path,
    conversations: Iterable[Dialogue],
    *,
    out_dir: str | Path,
    steps: int,
    batch_size: int = 16,
    lr: float = 3e-3,
    betas: tuple[float, float] = (0.9, 0.98),
    weight_decay: float = 0.01,
    max_grad_norm: float | None = 1.0,
    warmup_steps: int = 20,
    decay_fraction: float = 0.3,
    micro_batch_tokens: int = 16384,
    dtype: Literal["fp32", "bf16"] = "fp32",
    gradient_checkpointing: bool = False,
    shuffle: bool = True,
    seed: int = 0,
    stop_token_ids: Sequence[int] | None = None,
    team: Team | None = None,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> dict[str, float]:
    """Fine-tune a model directory on conversations and write the result as a new one, whole or not at all.

    Args:
        conversations: with ``messages`` and ``tools``; repeated as often as ``steps`` needs.
        steps: optimizer updates of ``batch_size`` conversations.
        decay_fraction: last share of the steps over which the rate falls linearly to 0.
        micro_batch_tokens: most tokens in one forward pass.
        shuffle: anew in each pass, by ``seed``; False keeps the given order (a curriculum).
        stop_token_ids: see `render_example`.
        on_step: gets ``step, sft/loss, sft/tokens, actor/lr, actor/grad_norm, perf/throughput`` after each update.

    Returns:
        The last step's metrics.

    Raises:
        DataError: a conversation cannot be rendered, or is longer than ``micro_batch_tokens``.
        TrainingDiverged: gradients were not finite several times in a row.
    """
    from transformers import AutoTokenizer

    team = team or start_team()
    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
    examples = [render_example(tokenizer, dialogue, stop_token_ids=stop_token_ids) for dialogue in conversations]
    if not examples:
        raise DataError("there are no conversations to train on")
    policy = load_policy(model_dir, team, dtype=dtype, gradient_checkpointing=gradient_checkpointing)
    settings = OptimizerSettings(
        lr=lr, betas=betas, weight_decay=weight_decay, max_grad_norm=max_grad_norm, schedule="linear", num_steps=steps,
        warmup_steps=warmup_steps, decay_fraction=decay_fraction,
    )  # fmt: skip
    optimizer = build_optimizer(policy, settings)
    batches = _batches(examples, batch_size=batch_size, shuffle=shuffle, seed=seed)
    metrics: dict[str, float] = {}
    nonfinite_in_a_row = 0
    for step, batch in enumerate(itertools.islice(batches, steps)):
        started = time.perf_counter()
        loss = _accumulate(policy, batch, team, micro_batch_tokens=micro_batch_tokens)
        norm, was_applied = update(policy, optimizer, settings, step)
        nonfinite_in_a_row = 0 if was_applied else nonfinite_in_a_row + 1
        if nonfinite_in_a_row >= MAX_NONFINITE_STEPS:
            raise TrainingDiverged(
                f"gradients were not finite in {nonfinite_in_a_row} updates in a row at step {step}: lower lr={lr:g}."
            )
        num_tokens = sum(len(example.ids) for example in batch)
        metrics = {
            "step": step + 1, "sft/loss": loss, "sft/tokens": num_tokens, "actor/lr": settings.lr_at(step), "actor/grad_norm": norm,
            "perf/throughput": num_tokens / (time.perf_counter() - started) / team.world_size,
        }  # fmt: skip
        if on_step is not None:
            on_step(metrics)
    _save(policy, team, Path(model_dir), Path(out_dir), dtype=dtype)
    return metrics


def _accumulate(policy: PolicyModel, batch: Sequence[Example], team: Team, *, micro_batch_tokens: int) -> float:
    """Gradients of the mean negative logprob per assistant token of the batch; returns that mean."""
    offsets = np.zeros(len(batch) + 1, dtype=np.int64)
    np.cumsum([len(example.ids) for example in batch], out=offsets[1:])
    ids = np.concatenate([example.ids for example in batch]).astype(np.int64)
    mask = np.concatenate([example.mask for example in batch])
    num_tokens = int(mask.sum())
    plan = plan_rows(
        np.diff(offsets).tolist(), budget_tokens=micro_batch_tokens, num_ranks=team.num_row_groups,
        names=[f"conversation {i} of the batch" for i in range(len(batch))],
    )  # fmt: skip
    total = torch.zeros((), dtype=torch.float64)
    for sequences in plan[team.row_group]:
        if sequences:
            row = pack_row(offsets, sequences)
            positions = torch.from_numpy(np.flatnonzero(mask[row.token_index])).to(team.device)
            row_ids = torch.from_numpy(ids[row.token_index]).to(team.device)
            logprobs, _ = run_row(policy, row_ids, row, positions, also=None)
            loss = -logprobs.sum() / num_tokens
        else:
            loss = empty_pass(policy, team)
        (loss * team.world_size).backward()
        if team.speaks_for_rows:
            total += loss.detach().double().cpu()
    return float(team.sum_(total))


def _batches(examples: Sequence[Example], *, batch_size: int, shuffle: bool, seed: int) -> Iterator[list[Example]]:
    """Endless batches; a pass's rest is carried into the next pass, so every example comes equally often."""
    rng = random.Random(seed)

    def endless() -> Iterator[Example]:
        while True:
            order = list(range(len(examples)))
            if shuffle:
                rng.shuffle(order)
            yield from (examples[i] for i in order)

    stream = endless()
    while True:
        yield list(itertools.islice(stream, batch_size))


def _save(policy: PolicyModel, team: Team, source: Path, out_dir: Path, *, dtype: Literal["fp32", "bf16"]) -> None:
    state = full_state(policy)
    if team.is_main:
        temporary = out_dir.with_name(f".{out_dir.name}.tmp")
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        write_hf_directory(temporary, state, policy, source=source if source.is_dir() else None, dtype=dtype)
        sync_tree(temporary)
        replace_directory(temporary, out_dir)
    team.barrier()


def _render(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool
) -> str:
    return tokenizer.apply_chat_template(
        list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=add_generation_prompt
    )


def _first_difference(rendered: str, prompt: str, whole: str) -> str:
    before, after = (rendered, prompt) if not prompt.startswith(rendered) else (prompt, whole)
    place = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after)))
    return f"…{before[max(0, place - 20) : place + 20]!r} became …{after[max(0, place - 20) : place + 20]!r}"
