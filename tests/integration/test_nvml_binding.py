"""GPUs read through NVIDIA's own Python binding, from a driver library that plays them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.nvml_fixtures import GIB, FakeDriver, FakeGpu, FakeMig

READ_TWICE = """
import json, sys
from pathlib import Path
import msgspec
from worker.nvml import open_nvml
nvml = open_nvml()
first = nvml.read()
Path(sys.argv[1]).write_text(Path(sys.argv[2]).read_text())
second = nvml.read()
nvml.close()
libraries = [line for line in open("/proc/self/maps") if "libcuda" in line]
print(json.dumps([msgspec.to_builtins(first), msgspec.to_builtins(second), libraries], default=str))
"""


def read_twice(before: FakeDriver, after: FakeDriver, **env: str) -> Any:
    """Readings of a process while the driver says what is in ``before``, then ``after``; and its CUDA libraries."""
    before.write()
    after.write()
    done = subprocess.run(
        [sys.executable, "-c", READ_TWICE, str(before.path), str(after.path)],
        env={**os.environ, **before.env, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_gpus_are_read_without_a_cuda_context(tmp_path: Path) -> None:
    """Memory, processes, ECC and Xid errors of two GPUs, of which one is lost later; libcuda is not loaded for it."""
    before = FakeDriver(tmp_path / "state", [FakeGpu("GPU-a"), FakeGpu("GPU-b", free_bytes=GIB)], [(1, 77, 23 * GIB)])
    after = FakeDriver(tmp_path / "after", [FakeGpu("GPU-a", uncorrected_ecc=3), FakeGpu("GPU-b", is_lost=True)])
    after.gpus[0].remap = (True, False)
    after.xids = [(0, 31), (1, 79)]
    first, second, libraries = read_twice(before, after)
    assert [(g["index"], g["uuid"], g["architecture"], g["driver"]) for g in first] == [
        (0, "GPU-a", 90, "570.00"),
        (1, "GPU-b", 90, "570.00"),
    ]
    assert (first[1]["free_bytes"], first[1]["used_by_pid"]) == (GIB, {"77": 23 * GIB})
    assert (second[0]["uncorrected_ecc"], second[0]["new_xids"]) == (3, [31])
    assert (second[1]["is_lost"], second[1]["new_xids"], second[1]["total_bytes"]) == (True, [79], 24 * GIB)
    assert (first[0]["remap_pending"], second[0]["remap_pending"]) == (False, True)
    assert libraries == []


def partitioned(path: Path) -> FakeDriver:
    """GPU 0 in MIG mode, its last two instances sharing a GPU instance's memory; GPU 1 whole."""
    migs = [FakeMig(0, "MIG-aa", 7, free_bytes=8 * GIB), FakeMig(2, "MIG-bb", 9, 20 * GIB, 20 * GIB)]
    migs.append(FakeMig(3, "MIG-cc", 9, 20 * GIB, 20 * GIB))
    gpus = [FakeGpu("GPU-a", 80 * GIB, 70 * GIB, migs=migs), FakeGpu("GPU-b")]
    return FakeDriver(path, gpus, [(100, 55, 2 * GIB), (0, 55, 2 * GIB)])


def test_a_gpu_in_mig_mode_is_its_instances_each_with_its_own_memory(tmp_path: Path) -> None:
    """Never the whole beside its parts, and no memory twice: of compute instances that share some, one is offered.

    Errors of memory are the whole GPU's; a program's error is its instance's. Instances come and go while it is read.
    """
    after = partitioned(tmp_path / "after")
    assert after.gpus[0].migs is not None
    del after.gpus[0].migs[0]
    after.gpus[0].uncorrected_ecc = 1
    after.xids = [(0, 31, 9), (0, 79), (0, 13, 7)]
    first, second, _ = read_twice(partitioned(tmp_path / "before"), after)
    assert [(g["index"], g["instance"], g["uuid"], g["total_bytes"], g["free_bytes"]) for g in first] == [
        (0, 0, "MIG-aa", 10 * GIB, 8 * GIB),
        (0, 2, "MIG-bb", 20 * GIB, 20 * GIB),
        (0, 3, "MIG-cc", 0, 0),
        (1, -1, "GPU-b", 24 * GIB, 24 * GIB),
    ]
    assert [(g["used_by_pid"], g["architecture"]) for g in first[:2]] == [({"55": 2 * GIB}, 90), ({}, 90)]
    assert first[1]["name"] == "Stand-in GPU MIG 1g.10gb"
    assert [bool(g["refused"]) for g in first] == [False, False, True, False]
    assert "MIG-bb" in first[2]["refused"]
    assert [(g["uuid"], g["uncorrected_ecc"], g["new_xids"]) for g in second] == [
        ("MIG-bb", 1, [31, 79]),
        ("MIG-cc", 1, [31, 79]),
        ("GPU-b", 0, []),
    ]


def test_mig_mode_without_instances_offers_no_memory_and_says_what_to_do(tmp_path: Path) -> None:
    """The driver would count the whole GPU's memory as free; no program can have any of it. One that is lost later is
    lost as what it was."""
    before = FakeDriver(tmp_path / "before", [FakeGpu("GPU-a", migs=[]), FakeGpu("GPU-b")])
    after = partitioned(tmp_path / "after")
    after.gpus[1].is_lost = True
    first, second, _ = read_twice(before, after)
    assert [(g["uuid"], g["total_bytes"], "nvidia-smi mig -cgi" in g["refused"]) for g in first] == [
        ("GPU-a", 0, True),
        ("GPU-b", 24 * GIB, False),
    ]
    assert [(g["uuid"], g["is_lost"]) for g in second] == [
        ("MIG-aa", False),
        ("MIG-bb", False),
        ("MIG-cc", False),
        ("GPU-b", True),
    ]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("MIG-bb", ["MIG-bb"]),
        ("0", ["MIG-aa", "MIG-bb", "MIG-cc"]),
        ("1", ["GPU-b"]),
        ("MIG-aa,1", ["MIG-aa", "GPU-b"]),
    ],
)
def test_visible_devices_name_instances_too(tmp_path: Path, visible: str, expected: list[str]) -> None:
    """By their own name, or all of them by that of their GPU."""
    driver = partitioned(tmp_path / "state")
    first, _, _ = read_twice(driver, driver, CUDA_VISIBLE_DEVICES=visible)
    assert [g["uuid"] for g in first] == expected
