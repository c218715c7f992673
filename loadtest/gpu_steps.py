"""What ``gpu-check`` runs on a machine with a GPU: each step a process of its own, with a limit, told and kept.

A step that fails is reported with the end of its output, and the others go on. Results are written after every step,
so that a machine that is taken away leaves what was measured.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
_TAIL_CHARS: Final = 4000
_LIBRARIES: Final = (
    *("numpy", "ml_dtypes", "cupy-cuda12x", "cupy-cuda13x", "torch", "transformers", "fastsafetensors"),
    *("runai-model-streamer", "blake3", "wasmtime", "numkong", "cuda-bindings"),
)
#: Exit status of a step that this machine lacks something for: told, and no failure.
LACKING: Final = 77  # as automake has it; pytest uses the small numbers

Figures = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """``command`` is for this interpreter. ``after``: a step that must have passed. ``key``: where its JSON goes."""

    key: str
    name: str
    command: Sequence[str]
    limit_s: float
    after: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """A step's end. ``state``: ok, FAILED, lacking or left out."""

    step: Step
    state: str
    elapsed_s: float
    output: str

    @property
    def last_line(self) -> str:
        """What a table shows of it."""
        lines = [line.strip() for line in self.output.splitlines()]
        return next((line[:160] for line in reversed(lines) if any(map(str.isalnum, line))), "")


def run_step(step: Step, limit_s: float) -> Outcome:
    """Run it for at most ``limit_s`` seconds; whatever it has started ends with it."""
    begin_s = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *step.command],
        cwd=ROOT,
        env={**os.environ, **step.environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=max(limit_s, 1.0))
        state = {0: "ok", LACKING: "lacking"}.get(process.returncode, "FAILED")
        if process.returncode < 0:
            output += f"\nended by {signal.Signals(-process.returncode).name}"
    except subprocess.TimeoutExpired:
        _end_group(process)
        output, _ = process.communicate()
        state, output = "FAILED", f"{output}\nnot done after {limit_s:.0f} s"
    return Outcome(step, state, time.monotonic() - begin_s, output)


def _end_group(process: subprocess.Popen[str]) -> None:
    """SIGTERM to the step and what it started, then SIGKILL."""
    for number, wait_s in ((signal.SIGTERM, 20.0), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait_s)


def read_documents(text: str) -> list[Any]:
    """Every JSON object that a step printed, in order; other text between them is left out."""
    decoder, found, position = json.JSONDecoder(), [], 0
    while (position := text.find("{", position)) >= 0:
        try:
            document, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError:
            position += 1
            continue
        found.append(document)
    return found


class GpuRun:
    """Runs steps against a deadline and keeps what they gave in one JSON file."""

    def __init__(self, target: Path, gpu: str, total_s: float) -> None:
        self._target = target
        self._deadline_s = time.monotonic() + total_s
        self.outcomes: list[Outcome] = []
        self.record: Figures = {"gpu": gpu, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **describe_machine()}

    @property
    def remaining_s(self) -> float:
        """Seconds until the deadline."""
        return self._deadline_s - time.monotonic()

    def run(self, step: Step) -> Outcome:
        """Run one step, print its line, and write the record."""
        passed = {outcome.step.key for outcome in self.outcomes if outcome.state == "ok"}
        if step.after and step.after not in passed:
            outcome = Outcome(step, "left out", 0.0, f"needs {step.after}")
        elif self.remaining_s < 5:
            outcome = Outcome(step, "left out", 0.0, "no time is left")
        else:
            outcome = run_step(step, min(step.limit_s, self.remaining_s))
        self.outcomes.append(outcome)
        print(f"{outcome.state:8} {outcome.elapsed_s:6.1f} s  {step.name}: {outcome.last_line}", flush=True)
        if outcome.state == "FAILED":
            print(outcome.output[-_TAIL_CHARS:], flush=True)
        documents = read_documents(outcome.output)
        self.record.setdefault("steps", []).append(
            {
                "key": step.key,
                "state": outcome.state,
                "elapsed_s": round(outcome.elapsed_s, 1),
                "last_line": outcome.last_line,
                **({"output_tail": outcome.output[-_TAIL_CHARS:]} if outcome.state == "FAILED" else {}),
            }
        )
        if documents:
            self.record[step.key] = documents if len(documents) > 1 else documents[0]
        self.write()
        return outcome

    def write(self) -> None:
        """The record, whole or not at all."""
        self._target.parent.mkdir(parents=True, exist_ok=True)
        partial = self._target.with_suffix(".partial")
        partial.write_text(json.dumps(self.record, indent=1) + "\n")
        partial.replace(self._target)


def describe_machine() -> Figures:
    """Python, libraries, cores and memory."""
    versions = {}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": pages * page_bytes,
        "libraries": versions,
    }
