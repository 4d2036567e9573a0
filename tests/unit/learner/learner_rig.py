"""What the learner's tests share: a tiny model, groups made by hand, a source of groups in memory."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agentrl.learner.batching import BatchBuilder, StepBatch
from agentrl.learner.distributed import Team
from agentrl.learner.learner import Learner, LossSettings
from agentrl.learner.optim import OptimizerSettings
from agentrl.testing.tiny_model import make_tiny_model
from agentrl.types import GroupClose, Segment, Trajectory, TrajectoryGroup, Turn

VOCAB = 320


def tiny_dir(directory: Path, *, hidden_size: int = 32) -> Path:
    return make_tiny_model(directory / "tiny", vocab_size=VOCAB, hidden_size=hidden_size, max_number=20)


def plain_logprobs(model_dir: Path, ids: Sequence[int], *, temperature: float = 1.0) -> np.ndarray:
    """[T] by an ordinary transformers forward of this one sequence; entry 0 is 0."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([list(ids)])).logits[0, :-1] / temperature
    picked = torch.log_softmax(logits, -1).gather(-1, torch.tensor(list(ids))[1:, None])[:, 0]
    return np.concatenate([[0.0], picked.numpy()]).astype(np.float32)


def segment(rng: np.random.Generator, *, prompt: int, turns: Sequence[tuple[int, int]], version: int = 0) -> Segment:
    """A prompt, then (sampled, observed) token counts per turn."""
    mask = [False] * prompt
    for sampled, observed in turns:
        mask += [True] * sampled + [False] * observed
    kept = np.asarray(mask)
    return Segment(
        ids=rng.integers(8, VOCAB, len(mask)).astype(np.int32),
        mask=kept,
        logprobs=np.where(kept, -rng.uniform(1, 8, len(mask)), 0).astype(np.float32),
        versions=np.where(kept, version, -1).astype(np.int32),
        prompt_length=prompt,
    )


def trajectory(
    group: int, index: int, *, reward: float, segments: Sequence[Segment], terms: Mapping[str, float] | None = None
) -> Trajectory:
    return Trajectory(
        id=f"t{group}/{group}/{index}/0", task_id=f"t{group}", group_id=f"t{group}/{group}", ordinal=group, sample_index=index,
        attempt=0, env="env", agent="tool_agent", data_source="test", split="train", segments=tuple(segments), reward=reward,
        reward_terms=terms if terms is not None else {"correct": reward},
        turns=(Turn(kind="model", segment=0, start=0, end=1, ms=1.0),),
    )  # fmt: skip


def close(group: int, trajectories: Sequence[Trajectory], failed: Mapping[str, str] | None = None) -> TrajectoryGroup:
    failed = dict(failed or {})
    return TrajectoryGroup(
        GroupClose(
            group_id=f"t{group}/{group}", task_id=f"t{group}", ordinal=group, size=len(trajectories) + len(failed),
            members=tuple(t.id for t in trajectories), failed=failed,
        ),
        tuple(trajectories),
    )  # fmt: skip


def random_group(group: int, *, size: int = 3, version: int = 0, seed: int = 0, num_segments: int = 1) -> TrajectoryGroup:
    """Rewards alternate, so that there is spread; lengths vary."""
    rng = np.random.default_rng([seed, group])
    members: list[Trajectory] = []
    for index in range(size):
        segments = [
            segment(
                rng, prompt=int(rng.integers(2, 9)), version=version,
                turns=[(int(rng.integers(1, 7)), int(rng.integers(0, 5))), (int(rng.integers(1, 5)), 0)],
            )
            for _ in range(num_segments)
        ]  # fmt: skip
        members.append(trajectory(group, index, reward=float(index % 2) + 0.1 * index, segments=segments))
    return close(group, members)


def batch_of(groups: Sequence[TrajectoryGroup], *, version: int = 0, max_staleness: int = 100, **options: Any) -> StepBatch:
    builder = BatchBuilder(groups_per_step=len(groups), max_staleness=max_staleness, **options)
    for group in groups:
        builder.add(group)
    return builder.build(version)


def make_learner(
    model_dir: Path,
    team: Team,
    *,
    lr: float = 1e-2,
    micro_batch_tokens: int = 4096,
    loss: LossSettings | None = None,
    **options: Any,
) -> Learner:
    optimizer = OptimizerSettings(lr=lr, betas=(0.9, 0.95), **options.pop("optimizer", {}))
    return Learner(model_dir, team=team, optimizer=optimizer, loss=loss, micro_batch_tokens=micro_batch_tokens, **options)


def weights_of(learner: Learner) -> dict[str, torch.Tensor]:
    from agentrl.learner.model import full_state

    return {name: value.clone() for name, value in full_state(learner.policy).items()}


def assert_same_weights(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor], *, atol: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


class MemorySource:
    """A stream in memory: delivers unacknowledged groups again to each new learner."""

    def __init__(self, groups: Sequence[TrajectoryGroup]) -> None:
        self.groups = list(groups)
        self.acknowledged: dict[str, str] = {}
        self.commits: list[list[str]] = []
        self.progress: list[int] = []
        self.epoch = 0
        self._next = 0

    def acquire(self) -> int:
        self.epoch += 1
        self._next = 0
        return self.epoch

    def next_group(self, timeout_s: float) -> TrajectoryGroup | None:
        while self._next < len(self.groups):
            group = self.groups[self._next]
            self._next += 1
            if not all(member in self.acknowledged for member in group.close.members):
                return group
        return None

    def commit(self, groups: Sequence[TrajectoryGroup], outcomes: Mapping[str, str]) -> None:
        ids = [i for group in groups for i in (*group.close.members, *group.close.failed)]
        assert not set(ids) & set(self.acknowledged), "acknowledged twice"
        self.acknowledged |= {i: outcomes[i] for i in ids}
        self.commits.append(ids)

    def report_progress(self, consumed_groups: int) -> None:
        self.progress.append(consumed_groups)
