"""How many threads the CPU backend takes: affinity and control group quotas, versions 1 and 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from worker.backends.cores import count_usable_cores, read_quota_cores


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return tmp_path / "self-cgroup"


@pytest.mark.parametrize(
    ("cpu_max", "quota"),
    [("200000 100000\n", 2.0), ("150000 100000", 1.5), ("50000 100000", 0.5), ("max 100000", None), ("", None)],
)
def test_version_2_quota(tmp_path: Path, own: Path, cpu_max: str, quota: float | None) -> None:
    """``cpu.max`` of the process's group; "max" and an empty file are no limit."""
    own.write_text("0::/app\n")
    _write(tmp_path / "app" / "cpu.max", cpu_max)
    assert read_quota_cores(tmp_path, own) == quota


def test_smallest_quota_upwards_counts(tmp_path: Path, own: Path) -> None:
    """A parent's quota binds its children, as in the kernel."""
    own.write_text("0::/outer/inner\n")
    _write(tmp_path / "outer" / "cpu.max", "100000 100000")
    _write(tmp_path / "outer" / "inner" / "cpu.max", "400000 100000")
    assert read_quota_cores(tmp_path, own) == 1.0


def test_container_sees_its_own_group_at_the_root(tmp_path: Path, own: Path) -> None:
    """In a container the path may be unknown under the mount: the mount is the group."""
    own.write_text("0::/../../docker/abc\n")
    _write(tmp_path / "cpu.max", "300000 100000")
    assert read_quota_cores(tmp_path, own) == 3.0


@pytest.mark.parametrize(("quota_us", "quota"), [("150000", 1.5), ("-1", None)])
def test_version_1_quota(tmp_path: Path, own: Path, quota_us: str, quota: float | None) -> None:
    """``cpu.cfs_quota_us`` over its period; -1 is no limit."""
    own.write_text("5:cpu,cpuacct:/job\n4:memory:/job\n")
    _write(tmp_path / "cpu,cpuacct" / "job" / "cpu.cfs_quota_us", quota_us)
    _write(tmp_path / "cpu,cpuacct" / "job" / "cpu.cfs_period_us", "100000")
    assert read_quota_cores(tmp_path, own) == quota


def test_threads_never_exceed_affinity_nor_quota(tmp_path: Path, own: Path) -> None:
    """The smaller of both, whole cores only, at least one."""
    num_cores = len(os.sched_getaffinity(0))
    assert count_usable_cores(tmp_path, tmp_path / "missing") == num_cores
    own.write_text("0::/\n")
    _write(tmp_path / "cpu.max", f"{100_000 * (num_cores + 4)} 100000")
    assert count_usable_cores(tmp_path, own) == num_cores
    _write(tmp_path / "cpu.max", "50000 100000")
    assert count_usable_cores(tmp_path, own) == 1


def test_blas_has_one_thread_beside_the_products_pool() -> None:
    """A process that computes as a worker does has its own threads, NumKong's pool, and none of BLAS."""
    script = (
        "import threading, os, numpy as np, ml_dtypes\n"
        "np.ones((600, 600), np.float32) @ np.ones((600, 600), np.float32)\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "from worker.backends.numkong_cpu import NumKongBackend\n"
        "NumKongBackend(2).warm()\n"
        "print(before, len(os.listdir('/proc/self/task')))\n"
    )
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.split() == ["1", "2"]  # a pool of two threads is the caller and one more
