"""Buckets: every tensor once, one dtype each, none too large, and the bytes where the plan says."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from agentrl.errors import WeightSyncError
from agentrl.weights.buckets import plan_buckets


def snapshot(folder: Path) -> Path:
    generator = torch.Generator().manual_seed(1)
    first = {f"a{index}": torch.randn(5, index + 1, generator=generator).to(torch.bfloat16) for index in range(6)}
    second = {"big": torch.randn(64, 8, generator=generator), "ids": torch.arange(7), "one": torch.tensor(2.5).to(torch.bfloat16)}
    folder.mkdir()
    save_file(first, folder / "model-00001-of-00002.safetensors")
    save_file(second, folder / "model-00002-of-00002.safetensors")
    return folder


@pytest.mark.parametrize("max_bytes", [1, 100, 1 << 20])
def test_every_tensor_is_sent_once_in_buckets_of_one_dtype_and_bounded_size(tmp_path: Path, max_bytes: int) -> None:
    folder = snapshot(tmp_path / "s")
    wanted = load_file(folder / "model-00001-of-00002.safetensors") | load_file(folder / "model-00002-of-00002.safetensors")
    seen: dict[str, torch.Tensor] = {}
    for bucket in plan_buckets(folder, max_bytes=max_bytes):
        assert len(set(bucket.dtypes)) == 1
        assert bucket.num_bytes <= max_bytes or len(bucket.names) == 1
        for name, dtype, shape, (file, begin, size) in zip(
            bucket.names, bucket.dtypes, bucket.shapes, bucket.pieces, strict=True
        ):
            data = bytearray(Path(file).read_bytes()[begin : begin + size])
            assert name not in seen
            seen[name] = torch.frombuffer(data, dtype=getattr(torch, dtype)).reshape(shape)
    assert seen.keys() == wanted.keys()
    assert all(torch.equal(seen[name], tensor) for name, tensor in wanted.items())


def test_few_buckets_when_there_is_room(tmp_path: Path) -> None:
    buckets = plan_buckets(snapshot(tmp_path / "s"), max_bytes=1 << 30)
    assert sorted(bucket.dtypes[0] for bucket in buckets) == ["bfloat16", "float32", "int64"]


def test_directory_without_weights_and_a_torn_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightSyncError, match="nothing to broadcast"):
        plan_buckets(tmp_path, max_bytes=100)
    folder = snapshot(tmp_path / "s")
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(WeightSyncError, match="not a complete safetensors file"):
        plan_buckets(folder, max_bytes=100)
