"""NVIDIA's management library, played by a C library of our own: what is tested reads it by NVIDIA's own binding."""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

SOURCE = Path(__file__).with_name("nvml_stand_in.c")
GIB = 1 << 30


@functools.cache
def library_folder() -> Path:
    """A folder with ``libnvidia-ml.so.1``, for LD_LIBRARY_PATH; compiled once a run."""
    folder = Path(tempfile.mkdtemp(prefix="gp-nvml-"))
    library = folder / "libnvidia-ml.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE)], check=True)
    return folder


@dataclass
class FakeGpu:
    """A GPU as the stand-in's file describes it."""

    uuid: str
    total_bytes: int = 24 * GIB
    free_bytes: int = 24 * GIB
    uncorrected_ecc: int = 0
    is_lost: bool = False
    remap: tuple[bool, bool] | None = None  # pending, failed; None: it has no such thing
    migs: list[FakeMig] | None = None  # None: MIG mode is off


@dataclass
class FakeMig:
    """A MIG instance; those of one ``gpu_instance`` share its memory."""

    number: int
    uuid: str
    gpu_instance: int
    total_bytes: int = 10 * GIB
    free_bytes: int = 10 * GIB


@dataclass
class FakeDriver:
    """What the stand-in tells; :meth:`write` after each change."""

    path: Path
    gpus: list[FakeGpu]
    processes: list[tuple[int, int, int]] = field(default_factory=list)  # index, pid, bytes
    xids: list[tuple[int, ...]] = field(default_factory=list)  # index, number, and of an instance its GPU instance

    def write(self) -> None:
        """Put it where the library reads it, in one piece."""
        lines = [
            f"gpu {g.uuid} {g.total_bytes} {g.free_bytes} 9 0 {g.uncorrected_ecc} {int(g.is_lost)}" for g in self.gpus
        ]
        lines += [f"process {index} {pid} {num_bytes}" for index, pid, num_bytes in self.processes]
        lines += [f"{'xid' if len(xid) == 2 else 'xid_of'} {' '.join(map(str, xid))}" for xid in self.xids]
        for index, gpu in enumerate(self.gpus):
            lines += [f"remap {index} {int(gpu.remap[0])} {int(gpu.remap[1])}"] if gpu.remap is not None else []
            lines += [f"mig_mode {index}"] if gpu.migs is not None else []
            lines += [
                f"mig {index} {mig.number} {mig.uuid} {mig.gpu_instance} {mig.total_bytes} {mig.free_bytes}"
                for mig in gpu.migs or ()
            ]
        new = self.path.with_suffix(".new")
        new.write_text("".join(f"{line}\n" for line in lines))
        os.replace(new, self.path)

    @property
    def env(self) -> dict[str, str]:
        """Variables of a process that is to find this driver."""
        return {"LD_LIBRARY_PATH": str(library_folder()), "NVML_STAND_IN": str(self.path)}
