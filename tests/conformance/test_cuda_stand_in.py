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


REFUSED_CAPTURE = """
from worker.backends.cuda.cupy_device import CupyDevice
from worker.backends.cuda.device import CaptureRefused, DeviceLost, MatrixProduct
from worker.backends.cuda.matrix_library import MatrixLibraryError
from worker.backends.cuda.opening import load_kernels

device = CupyDevice(0, load_kernels)
place, stream = device.allocate(1024), device.make_stream()
sizes = {"num_rows": 8, "num_outputs": 8, "width": 8, "out_stride": 8}
product = MatrixProduct("f32", place, place, place, **sizes)

def refuse(**_):
    raise MatrixLibraryError("cublasGemmEx", 13)

device._matrices.multiply = refuse
for call, expected in (
    (lambda: device.capture(stream, lambda: device.multiply(product, stream)), CaptureRefused),
    (lambda: device.multiply(product, stream), DeviceLost),
):
    try:
        call()
    except expected:
        continue
    raise AssertionError(expected)
"""


@pytest.mark.parametrize("script", [REFUSED_IMAGE, REFUSED_CAPTURE], ids=["image", "capture"])
def test_what_a_device_refuses_is_met_with_what_is_left(script: str) -> None:
    """An older driver cannot read what ships: kernels are compiled anew, once. A product that fails while captured
    costs the graph, not the worker; the same failure of one that runs is the device's end."""
    path = os.pathsep.join((str(TESTS.parent), str(TESTS / "stand_in_cupy")))
    command = [sys.executable, "-c", script]
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
