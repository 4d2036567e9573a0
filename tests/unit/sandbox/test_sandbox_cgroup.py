"""cgroup v2: found only where it is usable, written as the kernel expects it."""

import os
from pathlib import Path

from agentrl.sandbox.inside import cgroup


def _tree(root: Path, controllers: str) -> tuple[str, str]:
    own = root / "service"
    own.mkdir()
    (own / "cgroup.controllers").write_text(controllers)
    (own / "cgroup.subtree_control").write_text("")
    membership = root / "membership"
    membership.write_text("3:cpu:/elsewhere\n0::/service\n")
    return str(root), str(membership)


def test_without_the_memory_and_pids_controllers_there_is_none(tmp_path: Path) -> None:
    assert cgroup.find_writable(*_tree(tmp_path, "cpu hugetlb")) is None


def test_a_child_without_limits_is_no_use_and_is_removed_again(tmp_path: Path) -> None:
    mount, membership = _tree(tmp_path, "cpu memory pids")
    assert cgroup.find_writable(mount, membership) is None
    assert sorted(path.name for path in (tmp_path / "service").iterdir()) == ["cgroup.controllers", "cgroup.subtree_control"]


def test_without_cgroup_v2_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "membership").write_text("3:memory:/x\n")
    assert cgroup.find_writable(str(tmp_path), str(tmp_path / "membership")) is None
    assert cgroup.find_writable(str(tmp_path), str(tmp_path / "absent")) is None


def test_a_kill_for_memory_is_seen_in_the_runs_own_events(tmp_path: Path) -> None:
    run = tmp_path / "run-1"
    run.mkdir()
    (run / "memory.events").write_text("low 0\nhigh 0\nmax 12\noom 1\noom_kill 3\n")
    (run / "cgroup.kill").write_text("")
    (run / "cgroup.procs").write_text("")
    parent = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        cgroup.join(parent, "run-1")
        assert (run / "cgroup.procs").read_text() == "0"
        assert cgroup.remove(parent, "run-1") is True
        assert (run / "cgroup.kill").read_text() == "1"
        (run / "memory.events").write_text("oom 0\noom_kill 0\n")
        assert cgroup.remove(parent, "run-1") is False
    finally:
        os.close(parent)
