"""Checkpoints: written new, synced, renamed; then `latest` moves. Killed at any moment, a loadable `latest` remains.

`Checkpoints.save` returns when that is done. `Checkpoints.begin` takes a copy and leaves the writing to a thread: training goes on, and
whoever acknowledges by the checkpoint asks `Checkpoints.is_durable` first.

``checkpoints/step_N/`` holds, besides a plain Hugging Face directory at its root:

* ``dcp/``: sharded weights and optimizer (torch DCP), loadable on any number of ranks;
* ``trained_ids.jsonl``: one line per trajectory whose effect these weights contain, since the start of the run;
* ``ledger.jsonl``: the outcome of everything consumed, also what was filtered, stale or failed;
* ``state.json``: version, counters, random state, the loop's own state, its score where the best is kept, and the size of every
  file (the torn-write check).
"""

import base64
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from agentrl.errors import CheckpointError
from agentrl.learner.background import BackgroundTask
from agentrl.learner.best import KeepBest, best_of
from agentrl.learner.distributed import Team
from agentrl.learner.durable import point_link, remove_directory, replace_directory, sync_tree
from agentrl.learner.learner import Learner
from agentrl.learner.model import link_or_copy, link_tree

logger = logging.getLogger(__name__)

SCHEMA = 1
STATE_FILE = "state.json"
TRAINED_FILE = "trained_ids.jsonl"
LEDGER_FILE = "ledger.jsonl"
LATEST = "latest"
BEST = "best"
_STATE_FIELDS: dict[str, type] = {
    "step": int, "policy_version": int, "num_updates": int, "num_skipped_updates": int, "rng": str, "state": dict, "files": dict,
}  # fmt: skip
_STEP = re.compile(r"step_(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Consumed:
    """How one trajectory ended, as the checkpoint remembers it."""

    id: str
    step: int
    outcome: str
    digest: str = ""
    """Of what was trained on; empty when nothing came."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedCheckpoint:
    """What was restored."""

    path: Path
    step: int
    state: Mapping[str, Any]
    """What the loop had passed to `Checkpoints.save`."""
    outcomes: Mapping[str, str] = field(default_factory=dict[str, str])
    """Trajectory id -> outcome, of everything consumed up to this checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One checkpoint to be written, with everything that later steps would change."""

    temporary: Path
    final: Path
    record: dict[str, Any]
    consumed: Sequence[Consumed]
    follows: str | None
    """What ``latest`` named before."""


class Checkpoints:
    """The checkpoints of one run. Make it on every rank.

    Args:
        directory: created when the first one is saved.
        keep: complete checkpoints kept; those that ``latest`` and ``best`` name are never removed.
        best: what makes a checkpoint the best one, which the link ``best`` then names; None keeps none.
        on_stage: called with the name of each stage before it starts, for `begin` in its thread; for progress, and for tests that
            kill the process there.
    """

    def __init__(
        self, directory: str | Path, *, keep: int = 2, best: KeepBest | None = None, on_stage: Callable[[str], None] | None = None
    ) -> None:
        if keep < 2:
            raise ValueError(f"keep={keep} checkpoints is too few: a damaged newest one would leave nothing. Use 2 or more.")
        self.directory = Path(directory).absolute()
        self._keep = keep
        self._best = best
        self._on_stage = on_stage or _ignore
        self._parent: Path | None = None
        self._scores: list[float] = []
        self._writing: tuple[BackgroundTask, Path] | None = None
        self._writers: Any = None
        self._stager: DefaultStager | None = None

    def save(
        self,
        learner: Learner,
        *,
        step: int,
        state: Mapping[str, Any],
        consumed: Iterable[Consumed] = (),
        weights_from: str | Path | None = None,
    ) -> Path:
        """Write ``step_N`` and move ``latest`` to it; a collective. Durable when it returns.

        Args:
            step: N; a directory of that name from an abandoned lineage is replaced.
            state: the loop's own state (JSON values), returned by `load`.
            consumed: what was consumed since the checkpoint that this object saved or loaded before.
            weights_from: a published snapshot of exactly these weights, whose files are linked instead of gathered again.

        Raises:
            CheckpointError: the directory cannot be written.
        """
        self.is_durable(wait=True)
        job = self._prepare(learner, step=step, state=state, consumed=consumed)
        self._on_stage("shards")
        dcp.save(_sharded_state(learner), checkpoint_id=job.temporary / "dcp")
        self._export(learner, job, weights_from)
        if learner.team.is_main:
            self._finish(job)
        self._parent = job.final
        learner.team.barrier()
        return job.final

    def begin(
        self,
        learner: Learner,
        *,
        step: int,
        state: Mapping[str, Any],
        consumed: Iterable[Consumed] = (),
        weights_from: str | Path | None = None,
    ) -> Path:
        """As `save`, but the writing goes on in a thread when it returns; a collective. One at a time: it waits for the last one.

        Weights and moments are copied to host memory first, so the next step may change them. Nothing may be acknowledged by this
        checkpoint before `is_durable` says so.
        """
        self.is_durable(wait=True)
        if self._writers is None and learner.team.world_size > 1:
            # The writing thread's collectives must not meet those of the training: it has a group of its own.
            self._writers = dist.new_group(backend="gloo")
        if self._stager is None:
            self._stager = DefaultStager(
                StagingOptions(
                    use_pinned_memory=learner.team.device.type == "cuda", use_shared_memory=False, use_async_staging=False,
                    use_non_blocking_copy=False,
                )
            )  # fmt: skip
        job = self._prepare(learner, step=step, state=state, consumed=consumed)
        staged: Any = self._stager.stage(_sharded_state(learner))
        self._export(learner, job, weights_from)
        is_main = learner.team.is_main

        def write() -> None:
            self._on_stage("shards")
            # Behind this call every rank's shards are written: it ends with a collective of the writing threads.
            dcp.save(staged, checkpoint_id=job.temporary / "dcp", process_group=self._writers)
            if is_main:
                self._finish(job)

        self._writing = BackgroundTask(write, name="checkpoint"), job.final
        return job.final

    def is_durable(self, *, wait: bool = False, timeout_s: float | None = None) -> bool:
        """Whether everything that `begin` started is on disk and ``latest`` names it; on rank 0, that means all ranks' parts.

        Args:
            wait: until it is.
            timeout_s: of the waiting; None waits as long as it takes.

        Raises:
            CheckpointError: it could not be written; nothing was renamed, unless only the clearing up failed.
        """
        if self._writing is None:
            return True
        task, final = self._writing
        if wait:
            task.wait(timeout_s)
        if not task.is_done:
            return False
        if task.error is not None:  # now and whenever asked again: nobody may take a later call for the success of this one
            raise CheckpointError(
                f"checkpoint {final} could not be written: {type(task.error).__name__}: {task.error}. Nothing that it contains was "
                f"acknowledged. Check space and rights."
            ) from task.error
        self._writing = None
        self._parent = final
        return True

    def note(self, metrics: Mapping[str, float]) -> None:
        """Tell of a step's metrics: the mean of those since the last save is the next checkpoint's score."""
        if self._best is not None and self._best.metric in metrics:
            self._scores.append(float(metrics[self._best.metric]))

    def _prepare(self, learner: Learner, *, step: int, state: Mapping[str, Any], consumed: Iterable[Consumed]) -> _Job:
        """An empty directory to write into, and all that belongs to this moment; a collective."""
        team = learner.team
        final, temporary = self.directory / f"step_{step}", self.directory / f".step_{step}.tmp"
        if team.is_main:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                for leftover in self.directory.glob(".*.tmp"):
                    shutil.rmtree(leftover, ignore_errors=True)
                temporary.mkdir()
            except OSError as error:
                raise CheckpointError(
                    f"cannot write checkpoints under {self.directory}: {error}. Check space and rights."
                ) from error
        team.barrier()
        record: dict[str, Any] = {
            "schema": SCHEMA,
            "step": step,
            **learner.counters(),
            "rng": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
            "parent": self._parent.name if self._parent is not None else None,
            "state": dict(state),
        }
        if self._best is not None:
            record["score"] = self._best.score(self._scores)
            self._scores = []
        return _Job(
            temporary=temporary, final=final, record=record, consumed=list(consumed), follows=_target(self.directory / LATEST)
        )

    def _export(self, learner: Learner, job: _Job, weights_from: str | Path | None) -> None:
        self._on_stage("weights")
        if weights_from is None:
            learner.export(job.temporary)
        elif learner.team.is_main:
            link_tree(Path(weights_from), job.temporary)

    def load(self, learner: Learner, which: str | Path = "auto") -> LoadedCheckpoint | None:
        """Restore weights, optimizer, version, counters and random state; a collective.

        Args:
            which: ``auto`` takes what ``latest`` names, or the newest complete one when that is damaged, or nothing on a fresh run;
                ``disable`` restores nothing; anything else is the path of one checkpoint.

        Raises:
            CheckpointError: the named checkpoint is missing, torn, of an unknown schema, or of another model.
        """
        if str(which) == "disable":
            return None
        path = self._choose(learner.team, which)
        if path is None:
            return None
        saved = read_state(path)
        _restore_shards(learner, path)
        learner.restore_counters(saved)
        torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(saved["rng"])), dtype=torch.uint8))
        self._parent = path
        logger.info("checkpoint loaded path=%s step=%d", path, saved["step"])
        outcomes = {entry["id"]: entry["outcome"] for entry in read_jsonl(path / LEDGER_FILE)}
        return LoadedCheckpoint(path=path, step=int(saved["step"]), state=saved["state"], outcomes=outcomes)

    def latest(self) -> Path | None:
        """The checkpoint that `load` with ``auto`` would take."""
        return self._newest_complete()

    def _choose(self, team: Team, which: str | Path) -> Path | None:
        """Rank 0 looks; all ranks take what it found."""
        if not team.is_main:
            found = team.broadcast_json(None)
            if "error" in found:
                raise CheckpointError(found["error"])
            return Path(found["path"]) if found["path"] else None
        try:
            path = self._newest_complete() if str(which) == "auto" else self._named(Path(which).absolute())
        except CheckpointError as error:
            team.broadcast_json({"error": str(error)})
            raise
        team.broadcast_json({"path": str(path) if path is not None else ""})
        return path

    def _named(self, path: Path) -> Path:
        """A checkpoint that was asked for. One of this run becomes ``latest``: what follows it is another lineage now."""
        fault = damage(path)
        if fault is not None:
            raise CheckpointError(f"checkpoint {path} cannot be loaded: {fault}. Name another one, or use resume=auto.")
        if path.parent == self.directory and _STEP.fullmatch(path.name):
            point_link(self.directory / LATEST, path.name)
        return path

    def _finish(self, job: _Job) -> None:
        """Everything behind the shards, on rank 0: durable when it returns."""
        self._on_stage("records")
        parent, temporary, final = self._parent, job.temporary, job.final
        self._extend(parent, temporary, TRAINED_FILE, [
            {"step": c.step, "id": c.id, "digest": c.digest} for c in job.consumed if c.outcome == "trained"
        ])  # fmt: skip
        self._extend(parent, temporary, LEDGER_FILE, [
            {"step": c.step, "id": c.id, "outcome": c.outcome} for c in job.consumed
        ])  # fmt: skip
        self._on_stage("state")
        files = {str(f.relative_to(temporary)): f.stat().st_size for f in sorted(temporary.rglob("*")) if f.is_file()}
        (temporary / STATE_FILE).write_text(json.dumps(job.record | {"files": files}))
        self._on_stage("sync")
        sync_tree(temporary)
        if parent == final:
            raise CheckpointError(f"{final} is the checkpoint this run continues; it cannot be written again.")
        if (named := _target(self.directory / LATEST)) != job.follows:
            raise CheckpointError(
                f"{LATEST} under {self.directory} named {job.follows} when step {job.record['step']} was taken and names {named} now: "
                f"another learner writes here. This one stops; run one learner per run directory."
            )
        self._on_stage("rename")
        # A directory of that name belongs to an abandoned lineage, since this one reaches the step only now.
        replace_directory(temporary, final)
        self._on_stage("latest")
        point_link(self.directory / LATEST, final.name)
        best = self._name_best()
        self._on_stage("prune")
        self._prune(final, best)
        logger.info("checkpoint saved path=%s", final)

    def _extend(self, parent: Path | None, temporary: Path, name: str, entries: Sequence[Mapping[str, Any]]) -> None:
        """The parent's lines and the new ones. Without new ones the two checkpoints share one file."""
        target = temporary / name
        before = parent / name if parent is not None else None
        if before is not None and not entries:
            link_or_copy(before, target)
            return
        if before is not None:
            shutil.copyfile(before, target)
        with target.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(entry) + "\n" for entry in entries)

    def _name_best(self) -> Path | None:
        """Let ``best`` name the best of those that exist."""
        if self._best is None:
            return None
        link = self.directory / BEST
        found = best_of(sorted(_steps(self.directory), key=_step_number), self._best, read_state)
        if found is None:
            return None
        if _target(link) != found.name:
            point_link(link, found.name)
            logger.info("best checkpoint path=%s metric=%s", found, self._best.metric)
        return found

    def _prune(self, newest: Path, best: Path | None) -> None:
        """Keep the last ``keep`` complete ones of this lineage, what ``latest`` names, and the best."""
        steps = sorted(_steps(self.directory), key=lambda p: p.stat().st_mtime_ns)
        kept = {newest, best, *steps[-self._keep :]}
        for old in steps:
            if old not in kept:
                remove_directory(old)

    def _newest_complete(self) -> Path | None:
        link = self.directory / LATEST
        candidates = sorted(_steps(self.directory), key=_step_number, reverse=True)
        for torn in self.directory.glob(".*.tmp") if self.directory.is_dir() else ():
            logger.warning("unfinished checkpoint ignored path=%s; the next save removes it", torn)
        if link.is_symlink():
            named = link.parent / os.readlink(link)
            # What latest names comes first; a newer directory than that is one whose announcement never happened.
            candidates = [named, *(c for c in candidates if c != named)]
        for candidate in candidates:
            fault = damage(candidate)
            if fault is None:
                return candidate
            logger.warning("damaged checkpoint ignored path=%s: %s", candidate, fault)
        if candidates:
            raise CheckpointError(
                f"none of the {len(candidates)} checkpoints under {self.directory} is complete (see the warnings). "
                f"Restore one, or start anew with resume=disable."
            )
        return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint directory; None when it is complete."""
    if not path.is_dir():
        return "there is no such directory"
    try:
        saved = read_state(path)
    except CheckpointError as error:
        return str(error)
    if unlisted := [name for name in (TRAINED_FILE, LEDGER_FILE) if name not in saved["files"]]:
        return f"{STATE_FILE} does not list {', '.join(unlisted)}"
    for name, size in saved["files"].items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
    return None


def read_state(path: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint.

    Raises:
        CheckpointError: missing, not JSON, or of another schema.
    """
    try:
        saved = json.loads((path / STATE_FILE).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{STATE_FILE} cannot be read ({error})") from error
    if not isinstance(saved, dict) or saved.get("schema") != SCHEMA:
        found = saved.get("schema") if isinstance(saved, dict) else None
        raise CheckpointError(f"{STATE_FILE} has schema {found}, this version reads {SCHEMA}")
    wrong = [
        name for name, kind in _STATE_FIELDS.items() if not isinstance(saved.get(name), kind) or isinstance(saved[name], bool)
    ]
    if wrong or not all(isinstance(size, int) for size in saved["files"].values()):
        raise CheckpointError(f"{STATE_FILE} is malformed: {', '.join(wrong) or 'files'} is missing or of a wrong type")
    return saved


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file."""
    with path.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream if line.strip()]


def _parts(learner: Learner) -> dict[str, tuple[nn.Module, torch.optim.Optimizer]]:
    """Models with optimizers, by the prefix of their names in a checkpoint."""
    parts: dict[str, tuple[nn.Module, torch.optim.Optimizer]] = {"": (learner.policy, learner.optimizer)}
    if learner.critic is not None:
        parts["critic_"] = (learner.critic.model, learner.critic.optimizer)
    return parts


def _sharded_state(learner: Learner) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for prefix, (model, optimizer) in _parts(learner).items():
        state[f"{prefix}model"], state[f"{prefix}optimizer"] = get_state_dict(model, optimizer)
    return state


def _restore_shards(learner: Learner, path: Path) -> None:
    target = _sharded_state(learner)
    reader = dcp.FileSystemReader(path / "dcp")
    _check_names(target, reader.read_metadata().state_dict_metadata, path)
    kept = {
        prefix: [{k: g[k] for k in ("betas", "eps", "weight_decay")} for g in optimizer.param_groups]
        for prefix, (_, optimizer) in _parts(learner).items()
    }
    dcp.load(target, storage_reader=reader)
    for prefix, (model, optimizer) in _parts(learner).items():
        set_state_dict(model, optimizer, model_state_dict=target[f"{prefix}model"], optim_state_dict=target[f"{prefix}optimizer"])
        for group, setting in zip(optimizer.param_groups, kept[prefix], strict=True):
            group.update(setting)  # the moments are the checkpoint's, the settings are this run's


def _check_names(target: Mapping[str, Any], found: Mapping[str, Any], path: Path) -> None:
    """Every weight of ours is there in our shape, and nothing else is.

    Raises:
        CheckpointError: of another model.
    """
    wrong: list[str] = []
    for part in ("model", "critic_model"):
        weights: dict[str, Any] = target.get(part, {})
        for name, value in weights.items():
            saved = found.get(f"{part}.{name}")
            if saved is None:
                wrong.append(f"{name} is not in the checkpoint")
            elif tuple(saved.size) != tuple(value.shape):
                wrong.append(f"{name} is {list(saved.size)} there and {list(value.shape)} here")
        there = (n.removeprefix(f"{part}.") for n in found if n.startswith(f"{part}."))
        wrong += [f"{name} is only there" for name in there if name not in weights]
    if wrong:
        raise CheckpointError(
            f"checkpoint {path} is of another model: {'; '.join(wrong[:3])}{f' and {len(wrong) - 3} more' if wrong[3:] else ''}. "
            f"Use the model (and critic, and adapters) it was made with, or resume=disable."
        )


def _steps(directory: Path) -> list[Path]:
    return [p for p in directory.glob("step_*") if _STEP.fullmatch(p.name) and p.is_dir()] if directory.is_dir() else []


def _target(link: Path) -> str | None:
    return os.readlink(link) if link.is_symlink() else None


def _step_number(path: Path) -> int:
    match = _STEP.fullmatch(path.name)
    return int(match.group(1)) if match else -1


def _ignore(stage: str) -> None:
    pass
