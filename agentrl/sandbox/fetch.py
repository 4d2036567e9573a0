"""Reading result files out of a directory whose content is hostile: no link is followed, nothing blocks, sizes are bounded."""

import errno
import os
import stat
from collections.abc import Sequence

from agentrl.sandbox.inside import linux

_EXPLAINED = {
    errno.ELOOP: "refused: a symbolic link is in the path",
    errno.EXDEV: "refused: it leaves the working directory",
    errno.ENOENT: "not found",
    errno.ENXIO: "refused: not a regular file",
    errno.EACCES: "refused: its permissions forbid reading",
    errno.ENOTDIR: "not found",
}


def fetch_files(
    directory_fd: int, paths: Sequence[str], *, max_file_bytes: int, max_total_bytes: int
) -> tuple[dict[str, bytes], dict[str, str]]:
    """The regular files among ``paths`` below the directory, and for each other one the reason."""
    found: dict[str, bytes] = {}
    errors: dict[str, str] = {}
    left = max_total_bytes
    for path in paths:
        try:
            fd = linux.open_beneath(directory_fd, path)
        except OSError as error:
            errors[path] = _EXPLAINED.get(error.errno or 0, f"refused: {os.strerror(error.errno or 0)}")
            continue
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                errors[path] = "refused: not a regular file"
            elif status.st_size > min(max_file_bytes, left):
                errors[path] = f"refused: {status.st_size} bytes, at most {min(max_file_bytes, left)} are returned"
            else:
                found[path] = os.read(fd, status.st_size) if status.st_size else b""
                left -= len(found[path])
        finally:
            os.close(fd)
    return found, errors
