"""Write each new policy as a Hugging Face directory that servers load, and say what it is: a `PolicyRecord`.

A directory appears whole or not at all, and its name is never used twice: a resumed learner may reach the same version with
other weights, so the run epoch is part of it.

With ``full_every`` above 1 a snapshot may hold only what changed since the one before (`agentrl.weights.delta`). The full weights are
written all the same, to the scratch folder: their digest is what readers must arrive at, checkpoints link them, and the next delta
is made against them. What is saved is bytes that serve and its engines' machines read.
"""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

from agentrl.learner.durable import move_into_place, sync_tree
from agentrl.learner.learner import Learner
from agentrl.types import PolicyRecord
from agentrl.weights.delta import read_delta, write_delta
from agentrl.weights.digest import weights_digest

logger = logging.getLogger(__name__)

MAX_DELTA_SHARE = 0.5
"""Of the full snapshot's bytes: a larger delta saves too little for the work of putting it together."""


class WeightPublisher:
    """Snapshots under one directory; the last ``keep`` stay.

    Args:
        directory: created if missing; servers must see it under the same path.
        keep: snapshots kept, at least 2, so that a server still loading the previous one finishes, and can go back to it. What a
            kept delta builds on is kept too.
        full_every: a full snapshot at least this often, deltas in between where they pay; 1 publishes full ones only.
        scratch: for the last full weights, when it was a delta or an adapter that was published; default: beside the snapshots.
        adapters_only: publish the LoRA adapter that the learner exports, not the merged weights.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int = 3,
        full_every: int = 1,
        scratch: str | Path | None = None,
        adapters_only: bool = False,
    ) -> None:
        if keep < 2:
            raise ValueError(f"keep={keep} snapshots is too few: a server may still be loading the previous one. Use 2 or more.")
        self.directory = Path(directory).absolute()
        self._keep, self._full_every = keep, full_every
        self._scratch = Path(scratch).absolute() if scratch else self.directory / ".scratch"
        self._adapters_only = adapters_only
        self._last: PolicyRecord | None = None
        self._since_full = 0
        self.full_snapshot: Path | None = None
        """The weights of the last publication as a full directory; None before it."""

    def publish(self, learner: Learner, *, run_epoch: int) -> PolicyRecord:
        """Write the current weights and describe them; a collective. Durable when it returns."""
        version = learner.policy_version
        final = self.directory / f"e{run_epoch}-v{version:08d}"
        is_delta = self._may_be_delta(run_epoch) and not final.exists()
        in_scratch = is_delta or self._adapters_only
        temporary = (self._scratch if in_scratch else self.directory) / f".{final.name}.tmp"
        if learner.team.is_main:
            self.directory.mkdir(parents=True, exist_ok=True)
            if self._full_every > 1 or self._adapters_only:
                self._scratch.mkdir(parents=True, exist_ok=True)
                for leftover in self._scratch.glob("*e*-v*") if self._last is None else ():  # of a learner that was killed
                    shutil.rmtree(leftover, ignore_errors=True)
            shutil.rmtree(temporary, ignore_errors=True)
        learner.export(temporary)
        record = PolicyRecord(run_epoch=run_epoch, version=version, kind="full", path=str(final), digest="")
        if learner.team.is_main:
            record = replace(record, digest="" if self._adapters_only else weights_digest(temporary))
            if self._adapters_only:
                record = self._place_adapter(record, temporary, final)
            elif final.exists():
                # Same epoch and version can only mean the same weights (publishing twice); never change a published file.
                return self._published_before(record, temporary, final)
            else:
                record = self._place_delta(record, temporary, final) if is_delta else self._place_full(record, temporary, final)
            self._prune()
        self._last = record
        self._since_full = 0 if record.kind == "full" else self._since_full + 1
        return record

    def _may_be_delta(self, run_epoch: int) -> bool:
        last = self._last
        return (
            not self._adapters_only
            and last is not None
            and last.run_epoch == run_epoch
            and self._since_full + 1 < self._full_every
        )

    def _published_before(self, record: PolicyRecord, temporary: Path, final: Path) -> PolicyRecord:
        delta = read_delta(final)
        if delta is None:
            shutil.rmtree(temporary)
            self.full_snapshot = final
            return replace(record, digest=weights_digest(final))
        self._keep_in_scratch(temporary, final.name)
        return replace(record, kind="delta", digest=delta.digest)

    def _keep_in_scratch(self, full: Path, name: str) -> None:
        """The full weights behind a delta, instead of the ones before."""
        kept, before = self._scratch / name, self.full_snapshot
        shutil.rmtree(kept, ignore_errors=True)
        shutil.move(full, kept)
        if before is not None and before.parent == self._scratch and before != kept:
            shutil.rmtree(before, ignore_errors=True)
        self.full_snapshot = kept

    def _place_full(self, record: PolicyRecord, temporary: Path, final: Path) -> PolicyRecord:
        sync_tree(temporary)
        if temporary.parent == self.directory:
            move_into_place(temporary, final)
        else:  # the scratch folder may be another file system
            staged = self.directory / f".{final.name}.tmp"
            shutil.rmtree(staged, ignore_errors=True)
            shutil.copytree(temporary, staged)
            sync_tree(staged)
            move_into_place(staged, final)
            shutil.rmtree(temporary)
        if self.full_snapshot is not None and self.full_snapshot.parent == self._scratch:
            shutil.rmtree(self.full_snapshot, ignore_errors=True)
        self.full_snapshot = final
        return record

    def _place_adapter(self, record: PolicyRecord, temporary: Path, final: Path) -> PolicyRecord:
        """Publish the adapter; the merged weights are for checkpoints."""
        if not final.exists():
            staged = self.directory / f".{final.name}.tmp"
            shutil.rmtree(staged, ignore_errors=True)
            shutil.copytree(temporary / "adapter", staged)
            sync_tree(staged)
            move_into_place(staged, final)
        self._keep_in_scratch(temporary, final.name)
        return replace(record, kind="lora", digest=weights_digest(final))

    def _place_delta(self, record: PolicyRecord, temporary: Path, final: Path) -> PolicyRecord:
        """Publish what changed, or everything where that is not much more."""
        last, base = self._last, self.full_snapshot
        assert last is not None
        assert base is not None
        staged = self.directory / f".{final.name}.tmp"
        shutil.rmtree(staged, ignore_errors=True)
        delta = write_delta(staged, base=base, base_name=Path(last.path).name, new=temporary, digest=record.digest)
        if delta is None or delta.num_bytes > MAX_DELTA_SHARE * delta.full_bytes:
            shutil.rmtree(staged, ignore_errors=True)
            return self._place_full(record, temporary, final)
        sync_tree(staged)
        move_into_place(staged, final)
        self._keep_in_scratch(temporary, final.name)
        logger.info(
            "delta published label=%s changed=%.4f bytes=%d of %d",
            record.label, delta.changed / max(1, delta.total), delta.num_bytes, delta.full_bytes,
        )  # fmt: skip
        return replace(record, kind="delta")

    def _prune(self) -> None:
        snapshots = sorted((d for d in self.directory.glob("e*-v*") if d.is_dir()), key=lambda d: d.stat().st_mtime_ns)
        needed: set[str] = set()
        for kept in snapshots[-self._keep :]:
            name = kept.name
            while name not in needed:
                needed.add(name)
                delta = read_delta(self.directory / name)
                if delta is None:
                    break
                name = delta.base
        if self.full_snapshot is not None and self.full_snapshot.parent == self.directory:
            needed.add(self.full_snapshot.name)
        for old in snapshots:
            if old.name not in needed:
                shutil.rmtree(old, ignore_errors=True)
                logger.debug("snapshot removed path=%s", old)
