"""Write each new policy as a Hugging Face directory that servers load, and say what it is: a `PolicyRecord`.

A directory appears whole or not at all, and its name is never used twice: a resumed learner may reach the same version with
other weights, so the run epoch is part of it.
"""

import hashlib
import logging
import shutil
from pathlib import Path

from agentrl.learner.durable import move_into_place, sync_tree
from agentrl.learner.learner import Learner
from agentrl.types import PolicyRecord

logger = logging.getLogger(__name__)

READ_BYTES = 1 << 20


def weights_digest(directory: Path) -> str:
    """``sha256:<hex>`` over the bytes of the ``*.safetensors`` files, in name order."""
    digest = hashlib.sha256()
    for file in sorted(directory.glob("*.safetensors")):
        with file.open("rb") as stream:
            while data := stream.read(READ_BYTES):
                digest.update(data)
    return f"sha256:{digest.hexdigest()}"


class WeightPublisher:
    """Snapshots under one directory; the last ``keep`` stay.

    Args:
        directory: created if missing; servers must see it under the same path.
        keep: snapshots kept, at least 2, so that a server still loading the previous one finishes.
    """

    def __init__(self, directory: str | Path, *, keep: int = 3) -> None:
        if keep < 2:
            raise ValueError(f"keep={keep} snapshots is too few: a server may still be loading the previous one. Use 2 or more.")
        self.directory = Path(directory).absolute()
        self._keep = keep

    def publish(self, learner: Learner, *, run_epoch: int) -> PolicyRecord:
        """Write the current weights and describe them; a collective. Durable when it returns."""
        version = learner.policy_version
        final = self.directory / f"e{run_epoch}-v{version:08d}"
        temporary = self.directory / f".{final.name}.tmp"
        if learner.team.is_main:
            self.directory.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
        learner.export(temporary)
        digest = ""
        if learner.team.is_main:
            digest = weights_digest(temporary)
            sync_tree(temporary)
            if final.exists():
                # Same epoch and version can only mean the same weights (publishing twice); never change a published file.
                shutil.rmtree(temporary)
                digest = weights_digest(final)
            else:
                move_into_place(temporary, final)
            self._prune()
        return PolicyRecord(run_epoch=run_epoch, version=version, kind="full", path=str(final), digest=digest)

    def _prune(self) -> None:
        snapshots = sorted((d for d in self.directory.glob("e*-v*") if d.is_dir()), key=lambda d: d.stat().st_mtime_ns)
        for old in snapshots[: -self._keep]:
            shutil.rmtree(old, ignore_errors=True)
            logger.debug("snapshot removed path=%s", old)
