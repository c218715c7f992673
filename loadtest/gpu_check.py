"""``python -m loadtest gpu-check``: everything about the GPU backend that this machine can show, in one command.

With a GPU: its tests, the sanitizer where it is installed, and the measurements, as a table and as JSON. Without one it
says so and runs what needs none: the kernels' digests, the kernels on the CPU from the same source, the stream of
weights on the emulated device, and the conformance suite of all backends.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results" / "gpu"
#: What fits into a lent machine's time with room to spare.
TOTAL_S = 480.0
WITHOUT_GPU = (
    ("kernels are of their sources", ["-m", "worker.backends.kernels.build", "--check"]),
    (
        "kernels for every architecture; the same source on the CPU against float64",
        ["-m", "pytest", "-q", "tests/conformance", "-k", "cuda_kernels"],
    ),
    (
        "weight stream, order of streams, graphs, sampling on the emulated device",
        ["-m", "pytest", "-q", "tests/conformance/test_cuda_backend.py", "tests/unit/test_cuda_opening.py"],
    ),
    ("every backend against the reference", ["-m", "pytest", "-q", "tests/conformance/test_backends.py"]),
)


@dataclass(frozen=True)
class Outcome:
    """One stage's end."""

    name: str
    passed: bool
    elapsed_s: float
    output: str


def run_stage(name: str, command: list[str], limit_s: float) -> Outcome:
    """Run ``command`` with this interpreter and show how it ended. Never longer than ``limit_s``."""
    begin_s = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False, timeout=max(limit_s, 1)
        )
        passed, output = done.returncode == 0, done.stdout + done.stderr
    except subprocess.TimeoutExpired:
        passed, output = False, f"not done after {limit_s:.0f} s"
    outcome = Outcome(name, passed, time.monotonic() - begin_s, output)
    last = output.strip().splitlines()[-1] if output.strip() else ""
    print(f"{'ok    ' if passed else 'FAILED'} {outcome.elapsed_s:6.1f} s  {name}: {last}", flush=True)
    if not passed:
        print(output[-4000:], flush=True)
    return outcome


def find_gpu() -> str | None:
    """The first GPU as the driver's own tool names it; None: no tool, or no GPU."""
    if shutil.which("nvidia-smi") is None:
        return None
    fields = "--query-gpu=name,driver_version,memory.used,memory.total,pcie.link.gen.current"
    done = subprocess.run(["nvidia-smi", fields, "--format=csv,noheader"], capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None


def read_figures(text: str) -> dict[str, Any]:
    """The JSON object that a measurement printed; empty: none."""
    start = text.find("{")
    try:
        found, _ = json.JSONDecoder().raw_decode(text[start:]) if start >= 0 else ({}, 0)
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def format_table(figures: dict[str, Any]) -> list[str]:
    """Lines of the table: one model a line, beside the ceilings of the same run."""
    ceiling, bandwidth = figures["copy_ceiling_bytes_per_s"], figures["memory_bytes_per_s"]
    lines = [
        f"copy ceiling {ceiling / 1e9:.1f} GB/s, device memory {bandwidth / 1e9:.0f} GB/s, "
        f"context and modules {figures['context_and_modules_ms']:.0f} ms, "
        f"used by a warm worker {figures['device_used_warm_bytes'] / 2**20:.0f} MiB",
        f"{'model':12} {'T3 ms':>8} {'T2 ms':>8} {'unverified':>10} {'copy/ceiling':>12} "
        f"{'decode ms':>9} {'eager':>7} {'of bandwidth':>12} {'batch 32 ms':>11}",
    ]
    for name, model in figures["models"].items():
        lines.append(
            f"{name:12} {model['t3_ms']['median']:8.1f} {model['t2_spare_ms']['median']:8.1f} "
            f"{model['t2_spare_unverified_ms']['median']:10.1f} {model['copy_bytes_per_s'] / ceiling:12.0%} "
            f"{model['decode_ms']['1']:9.2f} {model['decode_eager_ms']:7.2f} "
            f"{model['decode_bytes_per_s'] / bandwidth:12.0%} {model['decode_ms'].get('32', 0.0):11.2f}"
        )
    for row in sorted(figures.get("sweep", []), key=lambda row: -row["bytes_per_s"])[:8]:
        lines.append(
            f"  {row['threads']:2} threads, {row['slots']:2} slots of {row['slot_bytes'] >> 20:2} MiB: "
            f"{row['bytes_per_s'] / 1e9:.1f} GB/s"
        )
    return lines


def check_with_gpu(gpu: str, models: str, rounds: int) -> int:
    """Tests and measurements on the GPU; writes the JSON. The exit code."""
    deadline_s = time.monotonic() + TOTAL_S
    print(f"GPU: {gpu}", flush=True)
    outcomes = [run_stage("tests on the device", ["-m", "pytest", "-q", "-m", "gpu"], 120)]
    ladder = ["-m", "worker.benchmarks.gpu_ladder", "--models", models, "--rounds", str(rounds), "--sweep"]
    measured = run_stage("measurements", ladder, deadline_s - time.monotonic() - 60)
    outcomes.append(measured)
    outcomes.append(run_stage("sanitizer", ["-m", "worker.benchmarks.gpu_sanitizer"], deadline_s - time.monotonic()))
    figures = read_figures(measured.output)
    if figures:
        print("\n".join(format_table(figures)))
        RESULTS.mkdir(parents=True, exist_ok=True)
        target = RESULTS / f"{time.strftime('%Y%m%d-%H%M%S')}.json"
        record = {"gpu": gpu, "python": platform.python_version(), **figures}
        target.write_text(json.dumps(record, indent=1) + "\n")
        print(f"wrote {target.relative_to(ROOT)}")
    return 0 if all(outcome.passed for outcome in outcomes) else 1


def run_gpu_check(arguments: list[str]) -> int:
    """Command line; 0 where all that this machine can show is as it should be."""
    parser = argparse.ArgumentParser(prog="python -m loadtest gpu-check", description=__doc__)
    parser.add_argument("--models", default="1b-bf16,8b-bf16,8b-int8", help="shape-type, comma separated")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args(arguments)
    gpu = find_gpu()
    if gpu is not None:
        return check_with_gpu(gpu, options.models, options.rounds)
    print("no GPU at hand: what follows needs none", flush=True)
    outcomes = [run_stage(name, command, TOTAL_S) for name, command in WITHOUT_GPU]
    return 0 if all(outcome.passed for outcome in outcomes) else 1
