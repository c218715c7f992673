"""Which machine gets the GPU backend, and that nothing of CUDA comes into a process that forks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from worker.agent_settings import read_agent_settings
from worker.backends.choice import make_backend
from worker.backends.cuda.device import DeviceError
from worker.backends.cuda.opening import compile_kernels, load_kernels
from worker.backends.detection import detect_backend
from worker.backends.protocol import BackendError

IMPORT_EVERYTHING = """
import sys
from worker.slot import prepare_to_fork
from worker.agent_settings import read_agent_settings
from worker.backends.choice import make_backend
from worker.backends.detection import detect_backend
import worker.agent, worker.zygote
prepare_to_fork()
detect_backend()
backend = make_backend("cuda", 1)
assert not backend.binds_before_fork
loaded = [name for name in sys.modules if name.partition(".")[0] in ("cupy", "cupy_backends", "cuda", "pynvml")]
libraries = ("libcuda", "libnv", "cublas")
maps = [line for line in open("/proc/self/maps") if any(name in line for name in libraries)]
print(loaded, maps)
"""


def test_agent_and_zygote_hold_nothing_of_cuda() -> None:
    """All that an agent and a zygote import, with the GPU backend chosen, loads no CUDA module and no CUDA library."""
    done = subprocess.run([sys.executable, "-c", IMPORT_EVERYTHING], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[] []", done.stderr


def test_machine_without_a_gpu_gets_the_cpu_backend(tmp_path: Path) -> None:
    """No folder of the driver, or an empty one: numkong."""
    assert detect_backend(tmp_path / "missing", tmp_path / "missing") == "numkong"
    assert detect_backend(tmp_path) == "numkong"


def test_machine_with_a_gpu_and_cupy_gets_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU in the driver's list counts where CuPy is installed, and only there."""
    (tmp_path / "0000:01:00.0").mkdir()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert detect_backend(tmp_path) == "cuda"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert detect_backend(tmp_path) == "numkong"


def test_backend_is_chosen_by_name() -> None:
    """The setting takes cuda; names may carry the GPU's number, and nothing else."""
    assert read_agent_settings(1000, {"GLOWPLUG_BACKEND": "cuda"}).backend == "cuda"
    assert make_backend("cuda:3", 1).name == "cuda"
    for name in ("cuda:x", "cuda:-1", "cuda1"):
        with pytest.raises(BackendError, match="expected"):
            make_backend(name, 1)


def test_warming_without_cupy_or_gpu_says_what_is_missing() -> None:
    """On a machine like this one the backend fails when it warms up, with an error that requests are told."""
    with pytest.raises(DeviceError, match=r"needs CuPy|cannot be used"):
        make_backend("cuda", 1).warm()


def test_compiling_for_a_device_that_no_compiler_knows_is_refused() -> None:
    """The message says for which device, and what to install or that the compiler refuses."""
    with pytest.raises(DeviceError, match=r"compute capability 1\.3, and none could be compiled"):
        compile_kernels(13)


def test_shipped_kernels_are_for_every_device_since_ampere() -> None:
    """Any compute capability from 8.0 on gets the shipped fatbin: machine code, or PTX for what is newer."""
    image = load_kernels(80)
    assert image[:4] == b"\x50\xed\x55\xba"  # a fatbin
    for architecture in (86, 89, 90, 100, 120, 130):
        assert load_kernels(architecture) == image
