from __future__ import annotations

import os
from pathlib import Path

import pytest

from qvit.runtime import processors as module
from qvit.runtime.processors import processors


def container(root: Path, groups: str, files: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture(autouse=True)
def sixty_four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda process: set(range(64)), raising=False)


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "100000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "350000 100000\n"}, 4),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 64),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "200000 100000\n"}, 2),
        ("0::/a/b\n", {"a/b/cpu.max": "300000 100000\n", "a/cpu.max": "200000 100000\n"}, 2),
        ("0::/a/b\n", {"a/b/cpu.max": "200000 100000\n", "a/cpu.max": "300000 100000\n"}, 2),
        ("0::/docker/x\n", {"cpu.max": "50000 100000\n"}, 1),  # inside, the mount's root is the container's
        ("4:cpu,cpuacct:/x\n", {"cpu/x/cpu.cfs_quota_us": "250000", "cpu/x/cpu.cfs_period_us": "100000"}, 3),
        ("4:cpu,cpuacct:/x\n", {"cpu/x/cpu.cfs_quota_us": "-1", "cpu/x/cpu.cfs_period_us": "100000"}, 64),
        ("4:cpu:/docker/x\n", {"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ("4:cpuset:/x\n5:cpu:/\n", {"cpu/x/cpu.cfs_quota_us": "9000", "cpu/x/cpu.cfs_period_us": "9000"}, 64),
        ("0::/\n", {"cpu.max": "0 100000\n"}, 64),
        ("0::/\n", {"cpu.max": "a\n"}, 64),
        ("0::/\n", {"cpu.max": "100000 0\n"}, 64),
    ],
)
def test_a_containers_share_limits_the_threads(
    tmp_path: Path, groups: str, files: dict[str, str], expected: int
) -> None:
    assert processors(container(tmp_path, groups, files)) == expected


def test_without_control_groups_the_mask_counts(tmp_path: Path) -> None:
    assert processors(tmp_path) == 64


def test_here_there_is_at_least_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert 1 <= processors() <= (os.cpu_count() or 1)
