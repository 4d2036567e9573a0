"""Deltas of weight files: the result is the original byte for byte, and what does not fit is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from agentrl.errors import WeightSyncError
from agentrl.serving.snapshot_store import SnapshotStore
from agentrl.types import PolicyRecord
from agentrl.weights.delta import CHANGES_FILE, DELTA_FILE, apply_delta, read_delta, write_delta
from agentrl.weights.digest import weights_digest

KINDS = [np.float32, np.float16, np.uint16, np.uint8, np.int64]


def write(folder: Path, tensors: dict[str, np.ndarray], *, files: int = 1) -> Path:
    folder.mkdir(parents=True)
    names = sorted(tensors)
    for index in range(files):
        part = {name: tensors[name] for name in names[index::files]}
        save_file(part, str(folder / f"model-{index}.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text("{}")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@given(seed=st.integers(0, 2**32 - 1), share=st.sampled_from([0.0, 0.001, 0.3, 1.0]), files=st.integers(1, 3))
def test_base_and_delta_give_the_new_files_byte_for_byte(
    tmp_path_factory: pytest.TempPathFactory, seed: int, share: float, files: int
) -> None:
    rng = np.random.default_rng(seed)
    root = tmp_path_factory.mktemp("delta")
    old = {
        f"layer.{i}.{kind.__name__}": rng.integers(0, 200, (int(rng.integers(1, 4)), 301)).astype(kind)
        for i, kind in enumerate(KINDS)
    }
    new = {name: np.where(rng.random(value.shape) < share, value + 1, value).astype(value.dtype) for name, value in old.items()}
    if share == 1.0:
        new["layer.0.float32"][0, 0] = np.nan  # bits, not numbers, are compared
    base, fresh = write(root / "base", old, files=files), write(root / "new", new, files=files)
    delta = write_delta(root / "delta", base=base, base_name="base", new=fresh, digest=weights_digest(fresh))
    assert delta is not None
    assert delta.changed == sum(
        int((old[n].view(np.uint8) != new[n].view(np.uint8)).reshape(old[n].size, -1).any(1).sum()) for n in old
    )
    assert delta.total == sum(value.size for value in old.values())
    assert read_delta(root / "delta") == delta
    apply_delta(root / "delta", base=base, out=root / "out")
    assert content(root / "out") == content(fresh)
    shutil.rmtree(root)


def test_other_layouts_are_no_delta(tmp_path: Path) -> None:
    a = write(tmp_path / "a", {"w": np.zeros(8, np.float32)})
    others = [
        write(tmp_path / "b", {"w": np.zeros(9, np.float32)}),
        write(tmp_path / "c", {"v": np.zeros(8, np.float32)}),
        write(tmp_path / "d", {"w": np.zeros(8, np.int32)}),
        write(tmp_path / "e", {"v": np.zeros(8, np.float32), "w": np.zeros(8, np.float32)}, files=2),
    ]
    for other in others:
        assert write_delta(tmp_path / "out", base=a, base_name="a", new=other, digest="") is None
        assert not (tmp_path / "out").exists()


def test_a_delta_on_another_base_or_damaged_is_refused(tmp_path: Path) -> None:
    old, new = np.arange(1000, dtype=np.float32), np.arange(1000, dtype=np.float32)
    new[700] = 5
    a, b = write(tmp_path / "e1-v1", {"w": old}), write(tmp_path / "b", {"w": new})
    digest = weights_digest(b)
    write_delta(tmp_path / "e1-v2", base=a, base_name="e1-v1", new=b, digest=digest)
    small = write(tmp_path / "small", {"w": old[:10]})
    with pytest.raises(WeightSyncError, match="index 700 is outside a tensor of 10"):
        apply_delta(tmp_path / "e1-v2", base=small, out=tmp_path / "out1")
    renamed = write(tmp_path / "renamed", {"v": old})
    with pytest.raises(WeightSyncError, match="does not have"):
        apply_delta(tmp_path / "e1-v2", base=renamed, out=tmp_path / "out2")
    record = PolicyRecord(run_epoch=1, version=2, kind="delta", path=str(tmp_path / "e1-v2"), digest=digest)
    full = SnapshotStore(tmp_path / "cache").full(record)
    assert (full.kind, full.label, weights_digest(full.path)) == ("full", "e1-v2", digest)
    # The base was changed under it: the digest tells.
    changed = old.copy()
    changed[3] = 9
    shutil.rmtree(a)
    write(a, {"w": changed})
    with pytest.raises(WeightSyncError, match="one of the two is damaged"):
        SnapshotStore(tmp_path / "cache").full(record)
    assert list((tmp_path / "cache").iterdir()) == []
    shutil.rmtree(a)
    with pytest.raises(WeightSyncError, match="is gone"):
        SnapshotStore(tmp_path / "cache").full(record)
    (tmp_path / "e1-v2" / CHANGES_FILE).write_bytes(b"torn")
    with pytest.raises(WeightSyncError, match="cannot be read"):
        apply_delta(tmp_path / "e1-v2", base=b, out=tmp_path / "out3")
    for text, hint in [("{", "cannot be read"), ('{"schema": 9}', "schema"), ('{"schema": 1}', "damaged")]:
        (tmp_path / "e1-v2" / DELTA_FILE).write_text(text)
        with pytest.raises(WeightSyncError, match=hint):
            read_delta(tmp_path / "e1-v2")
    fields = {"base": "../b", "digest": "", "changed": 0, "total": 0, "num_bytes": 0, "full_bytes": 0}
    (tmp_path / "e1-v2" / DELTA_FILE).write_text(json.dumps({"schema": 1, **fields}))
    with pytest.raises(WeightSyncError, match="no sibling"):
        read_delta(tmp_path / "e1-v2")


def test_a_chain_of_deltas_is_put_together_from_its_full_start_and_the_newest_stay(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    value = rng.standard_normal(5000).astype(np.float32)
    before = write(tmp_path / "full-0", {"w": value})
    shutil.copytree(before, tmp_path / "weights" / "e1-v0")
    records: list[PolicyRecord] = []
    for version in range(1, 7):
        value = value.copy()
        value[rng.integers(0, 5000, 20)] += 1
        fresh = write(tmp_path / f"full-{version}", {"w": value})
        path = tmp_path / "weights" / f"e1-v{version}"
        digest = weights_digest(fresh)
        delta = write_delta(path, base=before, base_name=f"e1-v{version - 1}", new=fresh, digest=digest)
        assert delta is not None
        assert delta.num_bytes < 0.1 * delta.full_bytes
        records.append(PolicyRecord(run_epoch=1, version=version, kind="delta", path=str(path), digest=digest))
        before = fresh
    store = SnapshotStore(tmp_path / "cache")
    late = store.full(records[3])  # a serve that starts late
    assert content(Path(late.path)) == content(tmp_path / "full-4")
    for record in records[4:]:
        assert content(Path(store.full(record).path)) == content(tmp_path / f"full-{record.version}")
    assert sorted(d.name for d in (tmp_path / "cache").iterdir()) == ["e1-v4", "e1-v5", "e1-v6"]
    full = PolicyRecord(run_epoch=1, version=0, path=str(tmp_path / "weights" / "e1-v0"), digest="")
    assert store.full(full) is full
