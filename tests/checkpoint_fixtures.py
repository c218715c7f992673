"""A driver that can take processes off their devices, played by a C library of our own."""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("checkpoint_stand_in.c")
RUNNING, LOCKED, CHECKPOINTED = 0, 1, 2


@functools.cache
def driver_library() -> Path:
    """The library; compiled once a run."""
    library = Path(tempfile.mkdtemp(prefix="gp-checkpoint-")) / "libcuda-stand-in.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE)], check=True)
    return library


class FakeCheckpointDriver:
    """What it does, and has done. :attr:`env` is for the processes that find it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.env = {"GLOWPLUG_DRIVER_LIBRARY": str(driver_library()), "CHECKPOINT_STAND_IN": str(folder)}

    def order(self, *lines: str) -> None:
        """Have calls fail; see the library. Nothing: no more."""
        new = self.folder / "orders.new"
        new.write_text("".join(f"{line}\n" for line in lines))
        os.replace(new, self.folder / "orders")

    def state(self, pid: int) -> int:
        """A process's state."""
        found = self.folder / str(pid)
        return int(found.read_text()) if found.exists() else RUNNING

    def calls(self) -> list[str]:
        """Names of all calls so far, in order."""
        found = self.folder / "calls"
        return [line.split()[0] for line in found.read_text().splitlines()] if found.exists() else []
