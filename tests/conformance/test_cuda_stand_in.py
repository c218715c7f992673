"""The tests of a device run here too, on a stand-in for CuPy and cuBLAS: what calls them is checked as well.

The stand-in has CuPy's signatures and the C library's calling convention, and refuses what CUDA refuses (allocation in
a capture, addresses of nobody, too much shared memory). It is a package of tests/stand_in_cupy, found by path.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_fixtures import KERNELS_ON

TESTS = Path(__file__).resolve().parent.parent


def run_device_tests(*arguments: str, **environment: str) -> str:
    """What pytest printed of the device's tests; they must all have passed, and none been left out."""
    path = os.pathsep.join((str(TESTS.parent), str(TESTS / "stand_in_cupy")))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-c", "tests/gpu.ini", "-q", *arguments],
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout
    return done.stdout


@pytest.mark.timeout(240)  # where the kernels have to be compiled first
def test_device_tests_pass_on_the_stand_in() -> None:
    """Logits, draws, batched decodes by graph and parking, through the file that imports CuPy."""
    assert "passed" in run_device_tests(
        "-k", "(64 or not agree) and not live and not qwen", "tests/conformance/test_cuda_gpu.py"
    )


REFUSED_IMAGE = """
from worker.backends.cuda.cupy_device import CupyDevice
from worker.backends.cuda.device import DeviceError
from worker.backends.cuda.opening import load_kernels

asked = []
CupyDevice(0, lambda _: b"of another time", lambda architecture: asked.append(architecture) or load_kernels(90)).close()
assert asked == [90], asked
for wrong in ({}, {"compile_kernels": lambda _: b"no better"}):
    try:
        CupyDevice(0, lambda _: b"of another time", **wrong)
    except DeviceError as error:
        assert "GPU 0 cannot be used" in str(error), error
    else:
        raise AssertionError("an image that the driver refuses was taken")
"""


def test_an_image_that_the_driver_refuses_is_compiled_anew_once() -> None:
    """An older driver cannot read what ships: the device asks for a compilation, and gives up after one."""
    path = os.pathsep.join((str(TESTS.parent), str(TESTS / "stand_in_cupy")))
    command = [sys.executable, "-c", REFUSED_IMAGE]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.timeout(240)
def test_kernel_suite_runs_through_the_device() -> None:
    """The suite of the emulation, with every launch by way of CuPy: one of each family."""
    chosen = "test_argmax or test_rope or (test_gemv and bf16 and 1) or (test_prefill_attention and bf16)"
    files = [
        f"tests/conformance/test_cuda_kernels_{name}.py" for name in ("elementwise", "linear", "attention", "sampling")
    ]
    assert "passed" in run_device_tests("-k", chosen, *files, **{KERNELS_ON: "cuda"})
