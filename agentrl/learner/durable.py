"""Files that survive a power cut, directories that appear whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from agentrl.errors import CheckpointError


@contextmanager
def writing(what: str, directory: Path) -> Generator[None]:
    """A disk that refuses is one error, whichever library met it.

    Raises:
        CheckpointError: naming the directory.
    """
    try:
        yield
    except (OSError, SafetensorError, CheckpointException) as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise CheckpointError(f"{what} could not be written under {directory}: {lines[-1]}. Check space and rights.") from error


def sync_file(path: Path) -> None:
    """Force a file's bytes to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Force a directory's files and names to the disk, deepest first."""
    for root, _, files in os.walk(directory, topdown=False):
        for name in files:
            sync_file(Path(root, name))
        sync_file(Path(root))


def move_into_place(temporary: Path, final: Path) -> None:
    """Give a finished, synced directory its name, durably."""
    os.rename(temporary, final)
    sync_file(final.parent)


def point_link(link: Path, target_name: str) -> None:
    """Make ``link`` a relative symlink to ``target_name``, atomically and durably."""
    temporary = link.with_name(f".{link.name}.new")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target_name)
    os.replace(temporary, link)
    sync_file(link.parent)


def replace_directory(temporary: Path, final: Path) -> None:
    """As `move_into_place`, where an older directory may hold the name; it is moved aside first, then deleted."""
    aside = _move_aside(final)
    move_into_place(temporary, final)
    shutil.rmtree(aside, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Delete a directory, out of sight first: whoever reads it meanwhile finds that it is gone, not that it is half there.

    One that cannot be moved stays as it is.
    """
    with contextlib.suppress(OSError):
        shutil.rmtree(_move_aside(path), ignore_errors=True)


def _move_aside(path: Path) -> Path:
    """Where it is now, if it was there."""
    aside = path.with_name(f".{path.name}.old.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    if path.exists():
        os.rename(path, aside)
    return aside
