"""One number for the weights in a directory."""

import hashlib
from pathlib import Path

import pytest

from agentrl.errors import WeightSyncError
from agentrl.weights.digest import weights_digest


def test_digest_covers_the_bytes_of_all_weight_files_in_name_order(tmp_path: Path) -> None:
    (tmp_path / "b.safetensors").write_bytes(b"second")
    (tmp_path / "a.safetensors").write_bytes(b"first")
    (tmp_path / "config.json").write_bytes(b"not counted")
    assert weights_digest(tmp_path) == "sha256:" + hashlib.sha256(b"firstsecond").hexdigest()
    with pytest.raises(WeightSyncError, match="holds no"):
        weights_digest(tmp_path / "nowhere")
