"""Runs a command under NVIDIA's ``compute-sanitizer`` and reads its verdict; for machines with a GPU and the tool."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

#: memcheck: out of bounds, misaligned; racecheck: shared memory; synccheck: divergent barriers; initcheck: unwritten
#: device memory that is read.
TOOLS: Final = ("memcheck", "racecheck", "synccheck", "initcheck")

_EXIT_CODE: Final = 86
_SUMMARY: Final = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)")


@dataclass(frozen=True, slots=True)
class SanitizerVerdict:
    """``num_errors`` is None where the tool printed no summary (it was killed, or the command failed to start)."""

    tool: str
    num_errors: int | None
    exit_code: int
    output: str

    @property
    def is_clean(self) -> bool:
        """The command succeeded and the tool found nothing."""
        return self.num_errors == 0 and self.exit_code == 0


def find_sanitizer() -> Path | None:
    """``compute-sanitizer`` on PATH or in the usual CUDA folders; None where it is not installed."""
    found = shutil.which("compute-sanitizer")
    if found:
        return Path(found)
    for root in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        for place in ("bin/compute-sanitizer", "compute-sanitizer/compute-sanitizer"):
            if root and (Path(root) / place).is_file():
                return Path(root) / place
    return None


def sanitizer_command(sanitizer: Path, tool: str, command: Sequence[str]) -> list[str]:
    """``command`` under ``tool``: children followed, an exit code of its own for errors."""
    if tool not in TOOLS:
        raise ValueError(f"{tool}: compute-sanitizer has {', '.join(TOOLS)}")
    options = ["--tool", tool, "--target-processes", "all", "--error-exitcode", str(_EXIT_CODE), "--print-limit", "20"]
    return [str(sanitizer), *options, *command]


def run_sanitizer(sanitizer: Path, tool: str, command: Sequence[str], *, limit_s: float) -> SanitizerVerdict:
    """Run ``command`` under ``tool``, for at most ``limit_s`` seconds. Blocks.

    Raises:
        TimeoutError: it took longer; it was killed.
    """
    try:
        done = subprocess.run(
            sanitizer_command(sanitizer, tool, command),
            capture_output=True,
            text=True,
            check=False,
            timeout=limit_s,
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"compute-sanitizer {tool}: not done after {limit_s:.0f} s") from error
    output = done.stdout + done.stderr
    found = _SUMMARY.findall(output)
    return SanitizerVerdict(tool, int(found[-1]) if found else None, done.returncode, output)
