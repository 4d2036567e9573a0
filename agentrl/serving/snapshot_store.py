"""Full weight directories for engines, whatever the learner published: deltas are put together here, once per version.

The directories lie where the engines can read them, as large as a full snapshot each; the newest few stay.
"""

import shutil
from dataclasses import replace
from pathlib import Path

from agentrl.errors import WeightSyncError
from agentrl.types import PolicyRecord
from agentrl.weights.delta import apply_delta, read_delta
from agentrl.weights.digest import weights_digest

MAX_CHAIN = 1000


class SnapshotStore:
    """Makes records that engines can load.

    Args:
        directory: for what is put together; emptied of what an earlier process left when it is first used.
        keep: directories kept, at least 3: the one that is served, the one to go back to, the one being made.
    """

    def __init__(self, directory: str | Path, *, keep: int = 3) -> None:
        if keep < 3:
            raise ValueError(f"keep={keep} is too few: an update, its predecessor and the one to roll back to need 3")
        self.directory = Path(directory).absolute()
        self._keep = keep
        self._is_fresh = True

    def full(self, record: PolicyRecord) -> PolicyRecord:
        """The same policy as a full directory. Blocks for as long as the files take to copy.

        Raises:
            WeightSyncError: a snapshot of the chain is missing or damaged, or the result has another digest than announced.
        """
        if record.kind != "delta":
            return record
        if self._is_fresh:  # run epochs start again when a run's stream is deleted: names of an earlier process mean nothing
            shutil.rmtree(self.directory, ignore_errors=True)
            self.directory.mkdir(parents=True)
            self._is_fresh = False
        path = self._put_together(Path(record.path), record.digest, links_left=MAX_CHAIN)
        self._prune(path)
        return replace(record, kind="full", path=str(path))

    def _put_together(self, snapshot: Path, digest: str, *, links_left: int) -> Path:
        out = self.directory / snapshot.name
        if out.is_dir():
            return out
        delta = read_delta(snapshot)
        if delta is None:
            if not snapshot.is_dir():
                raise WeightSyncError(f"{snapshot} is gone, but a later delta builds on it. The next full snapshot repairs that.")
            return snapshot
        if links_left == 0:
            raise WeightSyncError(f"{snapshot} is at the end of {MAX_CHAIN} deltas: their bases must run in a circle.")
        if delta.digest != digest:
            raise WeightSyncError(f"{snapshot} is a delta to {delta.digest}, expected {digest}: it was overwritten.")
        before = snapshot.parent / delta.base
        earlier = read_delta(before)
        base = self._put_together(before, earlier.digest if earlier else "", links_left=links_left - 1)
        temporary = self.directory / f".{snapshot.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            apply_delta(snapshot, base=base, out=temporary)
            found = weights_digest(temporary)
            if found != digest:
                raise WeightSyncError(f"{snapshot} on {base} gives {found}, announced was {digest}: one of the two is damaged.")
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return temporary.rename(out)

    def _prune(self, newest: Path) -> None:
        made = sorted((d for d in self.directory.glob("e*-v*") if d.is_dir()), key=lambda d: d.stat().st_mtime_ns)
        for old in [d for d in made if d != newest][: -(self._keep - 1)]:
            shutil.rmtree(old, ignore_errors=True)
