"""One number for "these weights": learner, reconciler and engines compute it alike, so a server can be asked what it holds."""

import hashlib
from pathlib import Path

from agentrl.errors import WeightSyncError

_CHUNK_BYTES = 1 << 20


def weights_digest(dir: str | Path) -> str:
    """``sha256:<hex>`` over the bytes of the directory's ``*.safetensors`` files, in name order.

    Raises:
        WeightSyncError: the directory is missing, unreadable or holds no such file.
    """
    path = Path(dir)
    files = sorted(path.glob("*.safetensors"), key=lambda file: file.name)
    if not files:
        raise WeightSyncError(f"{path} holds no *.safetensors file: there are no weights to identify. Check the path.")
    digest = hashlib.sha256()
    for file in files:
        try:
            with file.open("rb") as stream:
                while chunk := stream.read(_CHUNK_BYTES):
                    digest.update(chunk)
        except OSError as error:
            raise WeightSyncError(f"{file} could not be read ({error}): the weights cannot be identified.") from error
    return f"sha256:{digest.hexdigest()}"
