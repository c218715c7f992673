"""GPUs read through NVIDIA's own Python binding, from a driver library that plays them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.nvml_fixtures import GIB, FakeDriver, FakeGpu

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


def test_gpus_are_read_without_a_cuda_context(tmp_path: Path) -> None:
    """Memory, processes, ECC and Xid errors of two GPUs, of which one is lost later; libcuda is not loaded for it."""
    before = FakeDriver(tmp_path / "state", [FakeGpu("GPU-a"), FakeGpu("GPU-b", free_bytes=GIB)], [(1, 77, 23 * GIB)])
    before.write()
    after = FakeDriver(tmp_path / "after", [FakeGpu("GPU-a", uncorrected_ecc=3), FakeGpu("GPU-b", is_lost=True)])
    after.xids = [(0, 31), (1, 79)]
    after.write()
    done = subprocess.run(
        [sys.executable, "-c", READ_TWICE, str(before.path), str(after.path)],
        env={**os.environ, **before.env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second, libraries = json.loads(done.stdout.splitlines()[-1])
    assert [(g["index"], g["uuid"], g["architecture"], g["driver"]) for g in first] == [
        (0, "GPU-a", 90, "570.00"),
        (1, "GPU-b", 90, "570.00"),
    ]
    assert (first[1]["free_bytes"], first[1]["used_by_pid"]) == (GIB, {"77": 23 * GIB})
    assert (second[0]["uncorrected_ecc"], second[0]["new_xids"]) == (3, [31])
    assert (second[1]["is_lost"], second[1]["new_xids"], second[1]["total_bytes"]) == (True, [79], 24 * GIB)
    assert libraries == []
