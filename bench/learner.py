"""One optimizer step of the learner, beside a plain padded Hugging Face step and TRL's GRPO step, on the same trajectories.

    python bench/learner.py --model tiny --model runs/models/smollm2-135m --trl-python /path/to/venv-with-trl/bin/python

Each candidate runs in a process of its own and makes the same step: policy-gradient loss over the response tokens, backward, clip,
AdamW in fp32. Tokens per second count real tokens (prompt and response) for every candidate; padding is not work. With one thread a second of
CPU time is a second of a quiet core, so that the ratios, which are made of CPU time, hold on a busy machine too. Peak memory is the
high-water mark of resident memory during the timed steps, less what the process held before them (weights and optimizer state
included in "before"). The order of candidates turns in each round, so that a slow minute of the machine hits all of them.

* ``agentrl``: packed rows of ``--micro-tokens`` tokens, logits in chunks.
* ``padded``: micro-batches of ``--micro-sequences`` right-padded sequences, full logits, log-softmax, entropy.
* ``trl``: ``GRPOTrainer.compute_loss`` on its own batches: prompts padded left, completions padded right to the longest of the
  whole generation batch, as ``GRPOTrainer`` does.
* ``head-chunked`` and ``head-naive``: only LM head, logprob and entropy, forward and backward, at ``--head-tokens`` tokens.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]


def lengths(num: int, *, seed: int, mean: float, longest: int) -> list[tuple[int, int]]:
    """(prompt, response) token counts: log-normal responses, as rollouts have."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(40, 121, num)
    responses = np.minimum(np.maximum(rng.lognormal(np.log(mean), 0.7, num), 8), longest).astype(int)
    return [(int(p), int(r)) for p, r in zip(prompts, responses, strict=True)]


def peak_reset() -> float:
    """Start measuring the high-water mark anew; returns resident GiB now."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def memory(field: str) -> float:
    """GiB of a field of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 2**20


def measured(step: Callable[[], float], *, num_tokens: int, repeats: int, warm_up: Callable[[], object]) -> dict[str, float]:
    warm_up()
    before = peak_reset()
    seconds: list[float] = []
    cpu_seconds: list[float] = []
    loss = 0.0
    for _ in range(repeats):
        started, cpu_started = time.perf_counter(), time.process_time()
        loss = step()
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - cpu_started)
    best, best_cpu = min(seconds), min(cpu_seconds)
    return {
        "tokens_per_cpu_s": num_tokens / best_cpu, "tokens_per_s": num_tokens / best, "cpu_seconds": best_cpu, "seconds": best,
        "tokens": num_tokens, "loss": loss,
        "peak_gib": memory("VmHWM") - before, "resident_before_gib": before,
    }  # fmt: skip


def run_agentrl(o: argparse.Namespace) -> dict[str, float]:
    from agentrl.learner.batching import BatchBuilder
    from agentrl.learner.distributed import start_team
    from agentrl.learner.learner import Learner
    from agentrl.learner.optim import OptimizerSettings
    from agentrl.learner.settings import LossSettings

    team = start_team(device="cpu")
    learner = Learner(
        o.model_dir, team=team, optimizer=OptimizerSettings(lr=1e-9),
        loss=LossSettings(policy_params={"clip_ratio_c": None}), micro_batch_tokens=o.micro_tokens, chunk_size=o.chunk,
    )  # fmt: skip

    def batch(groups: list[Any]) -> Any:
        builder = BatchBuilder(groups_per_step=len(groups), max_staleness=10**6, zero_spread="keep")
        for group in groups:
            builder.add(group)
        return builder.build(learner.policy_version)

    groups = make_groups(o)
    tokens = sum(len(s.ids) for g in groups for t in g for s in t.segments)
    return measured(
        lambda: learner.step(batch(groups))["actor/pg_loss"], num_tokens=tokens, repeats=o.repeats,
        warm_up=lambda: learner.step(batch([smaller(groups[0])])),
    )  # fmt: skip


def smaller(group: Any) -> Any:
    """A group's first two members: a warm-up that costs little."""
    import dataclasses

    close = dataclasses.replace(group.close, size=2, members=group.close.members[:2])
    return dataclasses.replace(group, close=close, trajectories=group.trajectories[:2])


def make_groups(o: argparse.Namespace) -> list[Any]:
    """The workload as the stream delivers it; rewards alternate."""
    from agentrl.types import GroupClose, Segment, Trajectory, TrajectoryGroup

    ids = workload_ids(o)
    groups: list[Any] = []
    for g in range(0, len(ids), o.group):
        members: list[Any] = []
        for i, (prompt, response) in enumerate(ids[g : g + o.group]):
            tokens = np.concatenate([prompt, response]).astype(np.int32)
            mask = np.arange(len(tokens)) >= len(prompt)
            segment = Segment(
                ids=tokens, mask=mask, logprobs=np.where(mask, -8.0, 0.0).astype(np.float32),
                versions=np.where(mask, 0, -1).astype(np.int32), prompt_length=len(prompt),
            )  # fmt: skip
            members.append(Trajectory(
                id=f"t{g}/{g}/{i}/0", task_id=f"t{g}", group_id=f"t{g}/{g}", ordinal=g, sample_index=i, attempt=0, env="e", agent="a",
                data_source="d", split="train", segments=(segment,), reward=float(i % 2), reward_terms={"correct": float(i % 2)},
            ))  # fmt: skip
        close = GroupClose(
            group_id=f"t{g}/{g}", task_id=f"t{g}", ordinal=g, size=len(members), members=tuple(t.id for t in members)
        )
        groups.append(TrajectoryGroup(close, tuple(members)))
    return groups


def workload_ids(o: argparse.Namespace) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(1)
    sizes = lengths(o.sequences, seed=o.seed, mean=o.mean, longest=o.longest)
    return [(rng.integers(10, o.vocab, p), rng.integers(10, o.vocab, r)) for p, r in sizes]


def advantages(o: argparse.Namespace) -> np.ndarray:
    """GRPO's, for rewards that alternate within groups."""
    rewards = np.arange(o.sequences).reshape(-1, o.group) % o.group % 2
    spread = rewards.std(axis=1, ddof=1, keepdims=True)
    return ((rewards - rewards.mean(axis=1, keepdims=True)) / (spread + 1e-6)).reshape(-1)


def run_padded(o: argparse.Namespace) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(o.model_dir, dtype=torch.float32)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True)
    data, adv = workload_ids(o), advantages(o)
    total = sum(len(r) for _, r in data)

    def step(count: int) -> float:
        loss_sum = 0.0
        for start in range(0, count, o.micro_sequences):
            part = range(start, min(start + o.micro_sequences, count))
            width = max(len(data[i][0]) + len(data[i][1]) for i in part)
            ids = torch.zeros(len(part), width, dtype=torch.long)
            attention, response = torch.zeros_like(ids), torch.zeros(len(part), width)
            for row, i in enumerate(part):
                prompt, answer = data[i]
                end = len(prompt) + len(answer)
                ids[row, :end] = torch.from_numpy(np.concatenate([prompt, answer]))
                attention[row, :end], response[row, len(prompt) : end] = 1, 1
            logits = model(ids, attention_mask=attention).logits[:, :-1]
            log_p = logits.log_softmax(-1)
            logprobs = log_p.gather(-1, ids[:, 1:, None])[..., 0]
            with torch.no_grad():
                entropy = -(log_p.exp() * log_p).sum(-1)
            ratio = (logprobs + 8.0).clamp(-20, 20).exp()
            a = torch.tensor(adv[list(part)], dtype=torch.float32)[:, None]
            per_token = torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2))
            loss = (per_token * response[:, 1:]).sum() / total
            loss.backward()
            loss_sum += float(loss.detach()) + 0.0 * float(entropy.mean())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss_sum

    tokens = sum(len(p) + len(r) for p, r in data)
    return measured(lambda: step(o.sequences), num_tokens=tokens, repeats=o.repeats, warm_up=lambda: step(2))


def run_trl(o: argparse.Namespace) -> dict[str, float]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    model: Any = AutoModelForCausalLM.from_pretrained(o.model_dir, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(o.model_dir)
    with tempfile.TemporaryDirectory() as scratch:
        accumulate = -(-o.sequences // o.micro_sequences)
        config = GRPOConfig(
            output_dir=scratch, per_device_train_batch_size=o.micro_sequences, gradient_accumulation_steps=accumulate,
            num_generations=o.group if o.micro_sequences * accumulate % o.group == 0 else o.micro_sequences, use_cpu=True, bf16=False,
            report_to=[], loss_type="dapo", epsilon=0.2, beta=0.0, learning_rate=1e-9, gradient_checkpointing=False, disable_dropout=True,
        )  # fmt: skip
        trainer: Any = GRPOTrainer(
            model=model, reward_funcs=[lambda completions, **_: [0.0] * len(completions)], args=config,
            train_dataset=Dataset.from_dict({"prompt": ["a"] * 8}), processing_class=tokenizer,
        )  # fmt: skip
        model = trainer.accelerator.prepare(trainer.model)
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True)
        trainer.current_gradient_accumulation_steps = accumulate
        data, adv = workload_ids(o), advantages(o)
        widest_prompt, widest = max(len(p) for p, _ in data), max(len(r) for _, r in data)
        total = torch.tensor(float(sum(len(r) for _, r in data)))

        def step(count: int) -> float:
            loss_sum = 0.0
            for start in range(0, count, o.micro_sequences):
                part = range(start, min(start + o.micro_sequences, count))
                prompts = torch.zeros(len(part), widest_prompt, dtype=torch.long)
                answers = torch.zeros(len(part), widest, dtype=torch.long)
                prompt_mask, answer_mask = torch.zeros_like(prompts), torch.zeros_like(answers)
                for row, i in enumerate(part):
                    prompt, answer = data[i]
                    prompts[row, -len(prompt) :], prompt_mask[row, -len(prompt) :] = torch.from_numpy(prompt), 1
                    answers[row, : len(answer)], answer_mask[row, : len(answer)] = torch.from_numpy(answer), 1
                loss = trainer.compute_loss(model, {
                    "prompt_ids": prompts, "prompt_mask": prompt_mask, "completion_ids": answers, "completion_mask": answer_mask,
                    "advantages": torch.tensor(adv[list(part)], dtype=torch.float32), "num_items_in_batch": total,
                    "old_per_token_logps": torch.full(answers.shape, -8.0),
                })  # fmt: skip
                trainer.accelerator.backward(loss)
                loss_sum += float(loss.detach())
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss_sum

        tokens = sum(len(p) + len(r) for p, r in data)
        return measured(lambda: step(o.sequences), num_tokens=tokens, repeats=o.repeats, warm_up=lambda: step(2))


def run_head(o: argparse.Namespace, *, chunked: bool) -> dict[str, float]:
    import torch

    from agentrl.learner.logprobs import token_logprobs

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(o.head_tokens, o.hidden, generator=generator, requires_grad=True)
    weight = (torch.randn(o.vocab, o.hidden, generator=generator) * 0.02).requires_grad_()
    targets = torch.randint(0, o.vocab, (o.head_tokens,), generator=generator)

    def step(count: int) -> float:
        if chunked:
            logprobs, entropy = token_logprobs(hidden[:count], weight, targets[:count], chunk_size=o.chunk)
        else:
            log_p = (hidden[:count] @ weight.T).log_softmax(-1)
            logprobs = log_p.gather(-1, targets[:count, None])[:, 0]
            entropy = -(log_p.exp() * log_p).sum(-1)
        loss = -logprobs.mean() - 0.01 * entropy.mean()
        loss.backward()
        hidden.grad = weight.grad = None
        return float(loss.detach())

    return measured(lambda: step(o.head_tokens), num_tokens=o.head_tokens, repeats=o.repeats, warm_up=lambda: step(16))


CANDIDATES: dict[str, Callable[[argparse.Namespace], dict[str, float]]] = {
    "agentrl": run_agentrl,
    "padded": run_padded,
    "trl": run_trl,
    "head-chunked": lambda o: run_head(o, chunked=True),
    "head-naive": lambda o: run_head(o, chunked=False),
}


def in_a_process(name: str, options: dict[str, Any], *, python: str) -> dict[str, Any]:
    command = [python, str(Path(__file__).resolve()), "--candidate", name, "--options", json.dumps(options)]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1",
        "MALLOC_MMAP_THRESHOLD_": "1048576",  # freed tensors leave the process, so that the high-water mark is the step's own
    }  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(lines[-1][7:]) if lines else {"error": done.stderr.strip().splitlines()[-1:] or ["no output"]}


def model_options(model: str, scratch: Path, o: argparse.Namespace) -> dict[str, Any]:
    """Directory, vocabulary and a workload that takes seconds to a minute per step on one core."""
    if model == "tiny":
        from agentrl.testing.tiny_model import make_tiny_model

        path = make_tiny_model(scratch / "tiny", vocab_size=1024, hidden_size=128, num_layers=4)
        return {
            "model_dir": str(path), "vocab": 1024, "hidden": 128, "sequences": o.sequences * 4, "micro_tokens": 4096, "micro_sequences": 8,
            "mean": 120.0, "longest": 512, "repeats": o.repeats, "head_tokens": 16384,
        }  # fmt: skip
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(model)
    return {
        "model_dir": model, "vocab": config.vocab_size, "hidden": config.hidden_size, "sequences": o.sequences,
        "micro_tokens": 2048, "micro_sequences": 4, "mean": 80.0, "longest": 512, "repeats": o.repeats, "head_tokens": 4096,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="learner step against padded and TRL")
    parser.add_argument("--model", action="append", help="`tiny`, or a Hugging Face directory; may be repeated")
    parser.add_argument("--trl-python", help="interpreter of an environment that has TRL")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--sequences", type=int, default=16, help="of a large model's batch; four times as many of the tiny one's"
    )
    parser.add_argument("--repeats", type=int, default=2, help="timed steps per process; the fastest counts")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--candidate", help=argparse.SUPPRESS)
    parser.add_argument("--options", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.candidate:
        result = CANDIDATES[given.candidate](argparse.Namespace(**json.loads(given.options)))
        print("RESULT " + json.dumps(result))
        return
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for model in given.model or ["tiny"]:
            options = model_options(model, Path(scratch), given) | {"seed": 0, "group": 8, "chunk": 512}
            names = [name for name in CANDIDATES if name != "trl" or given.trl_python]
            results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
            for turn in range(given.rounds):
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    python = given.trl_python if name == "trl" else sys.executable
                    results[name].append(in_a_process(name, options, python=python))
                    print(Path(model).name, name, json.dumps(results[name][-1]), flush=True)
            report[Path(model).name] = summary(results)
    print(json.dumps(report, indent=2))
    if given.out:
        given.out.write_text(json.dumps(report, indent=2) + "\n")


def summary(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over rounds, and each candidate's speed relative to ours."""
    table: dict[str, Any] = {}
    for name, rounds in results.items():
        good = [r for r in rounds if "error" not in r]
        table[name] = (
            {key: round(statistics.median(r[key] for r in good), 4) for key in good[0]} if good else {"error": rounds[0]["error"]}
        )
    ours = table["agentrl"].get("tokens_per_cpu_s")
    for name in ("padded", "trl"):
        if ours and "tokens_per_cpu_s" in table.get(name, {}):
            table[f"agentrl / {name}"] = round(ours / table[name]["tokens_per_cpu_s"], 2)
    heads = [table[name].get("peak_gib") for name in ("head-chunked", "head-naive")]
    if all(heads):
        table["head peak, chunked / naive"] = round(heads[0] / heads[1], 3)
    return table


if __name__ == "__main__":
    main()
