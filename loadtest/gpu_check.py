"""``python -m loadtest gpu-check``: everything about the GPU backend that this machine can show, in one command.

With a GPU: its tests, the kernels' suite, the measurements beside the peers, the sanitizer where it is installed, as a
table and as JSON in ``loadtest/results/gpu/``. Without one it says so and runs what needs none: the kernels' digests,
the kernels for every architecture and on the CPU from the same source with a table of errors, the stream of weights on
the emulated device, the device's own tests on a stand-in for CuPy, and the conformance suite of all backends.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from loadtest.gpu_steps import GpuRun, Step, run_step
from loadtest.gpu_table import format_report

RESULTS: Final = Path(__file__).resolve().parent / "results" / "gpu"
#: What fits into a lent machine's time with room to spare.
TOTAL_S: Final = 480.0
_HTTP_S: Final = 190.0  # after which no round of the ladder through HTTP begins
_ON_DEVICE: Final = {"GLOWPLUG_KERNELS_ON": "cuda"}
_PYTEST: Final = ("-m", "pytest", "-q")
_DEVICE_PYTEST: Final = (*_PYTEST, "-c", "tests/gpu.ini", "-p", "no:asyncio")
WITHOUT_GPU: Final = (
    Step("digests", "kernels are of their sources", ("-m", "worker.backends.kernels.build", "--check"), 60),
    Step("compiled", "kernels for every architecture", (*_PYTEST, "tests/conformance/test_cuda_kernels_build.py"), 240),
    Step("coverage", "kernels on the CPU against float64", ("tests/kernel_coverage.py",), 240),
    Step(
        "emulated",
        "weight stream, order of streams, graphs, sampling on the emulated device",
        (*_PYTEST, "tests/conformance/test_cuda_backend.py", "tests/unit/test_cuda_opening.py"),
        240,
    ),
    Step("stand-in", "a device's own tests on a stand-in", (*_PYTEST, "tests/conformance/test_cuda_stand_in.py"), 240),
    Step("conformance", "every backend against the reference", (*_PYTEST, "tests/conformance/test_backends.py"), 240),
)


def find_gpu() -> str | None:
    """The first GPU as the driver's own tool names it; None: no tool, or no GPU."""
    if shutil.which("nvidia-smi") is None:
        return None
    fields = "--query-gpu=name,driver_version,memory.used,memory.total,pcie.link.gen.current"
    done = subprocess.run(["nvidia-smi", fields, "--format=csv,noheader"], capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None


def list_steps(options: argparse.Namespace, work: Path) -> list[Step]:
    """What is run on a GPU, what matters most first."""
    ladder = (
        "-m",
        "worker.benchmarks.gpu_ladder",
        "--rounds",
        str(options.rounds),
        "--probe-mib",
        str(options.probe_mib),
    )
    models = options.models.split(",")
    shape = options.checkpoint
    checkpoint, http = str(work / "checkpoint"), str(work / "http")
    ask_http = ("-m", "loadtest.gpu_http", checkpoint, http, "--rounds", str(options.rounds), "--limit-s", str(_HTTP_S))
    further = [Step(f"ladder-{name}", f"ladder of {name}", (*ladder, "--models", name), 110, "open") for name in models]
    peers = [
        Step(
            f"peer-{name}", f"peer: {name}", ("-m", "loadtest.gpu_peers", checkpoint, "--peer", name), 60, "checkpoint"
        )
        for name in ("naive", "fastsafetensors", "runai", "compiled")
    ]
    steps = [
        Step("open", "context, modules, warm-up", (*ladder, "--models", ""), 60),
        Step("device-tests", "tests on the device", (*_DEVICE_PYTEST, "tests/conformance/test_cuda_gpu.py"), 90),
        Step("kernels", "kernel suite on the device", ("tests/kernel_coverage.py",), 60, environment=_ON_DEVICE),
        Step(
            "ladder-" + models[0],
            f"ladder of {models[0]}, sweep",
            (*ladder, "--models", models[0], "--sweep"),
            100,
            "open",
        ),
        *further[1:2],
        Step(
            "checkpoint",
            "a checkpoint to serve",
            ("-m", "loadtest.random_checkpoint", checkpoint, "--shape", shape),
            60,
        ),
        Step("http", "T3, T2, T1 through HTTP", ask_http, _HTTP_S + 30, "checkpoint"),
        *peers[:1],
        *further[2:],
        *peers[1:],
        Step("suspend", "the driver's checkpoint", ("-m", "worker.benchmarks.gpu_suspend"), 40, "open"),
        Step("sanitizer", "compute-sanitizer", ("-m", "worker.benchmarks.gpu_sanitizer"), 90, "open"),
    ]
    chosen = options.only.split(",") if options.only else []
    return [step for step in steps if not chosen or any(step.key.startswith(one) for one in chosen)]


def check_with_gpu(gpu: str, options: argparse.Namespace) -> int:
    """Tests and measurements on the GPU; writes the JSON. The exit code."""
    print(f"GPU: {gpu}", flush=True)
    target = options.out / f"{time.strftime('%Y%m%d-%H%M%S')}.json"
    run = GpuRun(target, gpu, options.total_s)
    with tempfile.TemporaryDirectory(dir=options.work, prefix="gpu-check-") as work:
        for step in list_steps(options, Path(work)):
            run.run(step)
    print("\n".join(format_report(run.record)))
    print(f"wrote {target}")
    return 1 if any(outcome.state == "FAILED" for outcome in run.outcomes) else 0


def check_without_gpu() -> int:
    """Everything that needs none. The exit code."""
    print("no GPU at hand: what follows needs none", flush=True)
    failed = False
    for step in WITHOUT_GPU:
        outcome = run_step(step, step.limit_s)
        failed |= outcome.state == "FAILED"
        print(f"{outcome.state:8} {outcome.elapsed_s:6.1f} s  {step.name}: {outcome.last_line}", flush=True)
        if outcome.state == "FAILED":
            print(outcome.output[-4000:], flush=True)
        elif step.key == "coverage":
            print(outcome.output.rstrip(), flush=True)
    return 1 if failed else 0


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m loadtest gpu-check", description=__doc__)
    parser.add_argument("--models", default="1b-bf16,8b-bf16,8b-int4", help="shape-type, comma separated")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--probe-mib", type=int, default=1024, help="size of the copies that show the ceilings")
    parser.add_argument("--checkpoint", default="8b", help="shape that is served through HTTP and loaded by the peers")
    parser.add_argument("--only", help="steps to run, by the beginnings of their keys, comma separated")
    parser.add_argument("--total-s", type=float, default=TOTAL_S)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--work", type=Path, help="folder for checkpoints and snapshots, twice the model's size")
    return parser.parse_args(arguments)


def run_gpu_check(arguments: list[str]) -> int:
    """Command line; 0 where all that this machine can show is as it should be."""
    options = parse_options(arguments)
    gpu = find_gpu()
    if gpu is None:
        return check_without_gpu()
    if importlib.util.find_spec("cupy") is None:
        print(
            f"GPU: {gpu}, but {sys.executable} has no CuPy: "
            "pip install 'glowplug[gpu-cuda12]' or 'glowplug[gpu-cuda13]'"
        )
        return 1
    return check_with_gpu(gpu, options)
