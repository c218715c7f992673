"""What the GPU backend takes of CuPy 13 and 14, of CUDA 12 and 13: names, parameters, and where cuBLAS is found."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from worker.backends.cuda.device import DeviceError
from worker.backends.cuda.matrix_library import _list_libraries, load_library

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = ROOT / "tests" / "stand_in_cupy" / "cupy" / "cuda"
#: CuPy's parameters, the same in 13.0, 13.6, 14.0 and 14.2 (cupy_backends/cuda/api/runtime.pyx, cupy/cuda/function.pyx,
#: cupy/cuda/stream.pyx; 14 adds ``priority`` behind those of Stream).
CUPY = {
    "runtime.CUDARuntimeError": "status",
    "runtime.deviceSynchronize": "",
    "runtime.eventRecord": "event stream",
    "runtime.eventSynchronize": "event",
    "runtime.free": "ptr",
    "runtime.freeHost": "ptr",
    "runtime.getDeviceProperties": "device",
    "runtime.graphLaunch": "graphExec stream",
    "runtime.hostAlloc": "size flags",
    "runtime.hostRegister": "ptr size flags",
    "runtime.hostUnregister": "ptr",
    "runtime.malloc": "size",
    "runtime.memGetInfo": "",
    "runtime.memcpyAsync": "dst src size kind stream",
    "runtime.memsetAsync": "ptr value size stream",
    "runtime.runtimeGetVersion": "",
    "runtime.setDevice": "device",
    "runtime.streamWaitEvent": "stream event flags",
    "function.Module": "",
    "cupy.cuda.Event": "block disable_timing interprocess",
    "cupy.cuda.Stream": "null non_blocking ptds",
}


def names_in_use() -> set[str]:
    """Every name of CuPy's that the device takes, e.g. ``runtime.malloc``."""
    tree = ast.parse((ROOT / "worker/backends/cuda/cupy_device.py").read_text())
    found = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return {name for name in found if name.startswith(("runtime.", "function.", "cupy.cuda.")) and name.count(".") < 3}


def stand_in_parameters(name: str) -> list[str]:
    """Parameters of the stand-in's function or class of that name."""
    module, _, attribute = name.rpartition(".")
    file = {"runtime": "runtime.py", "function": "function.py", "cupy.cuda": "__init__.py"}[module]
    (found,) = [
        node for node in ast.parse((STAND_IN / file).read_text()).body if getattr(node, "name", "") == attribute
    ]
    if isinstance(found, ast.ClassDef):
        (found,) = [node for node in found.body if getattr(node, "name", "") == "__init__"]
    assert isinstance(found, ast.FunctionDef)
    return [argument.arg for argument in found.args.args if argument.arg != "self"]


def test_every_name_of_cupy_was_read_in_both_versions() -> None:
    """Who takes another one of CuPy's names must look it up in 13 and 14 first; the stand-in has their parameters."""
    assert names_in_use() == set(CUPY)
    for name, parameters in CUPY.items():
        assert stand_in_parameters(name)[: len(parameters.split())] == parameters.split(), name


@pytest.mark.parametrize(("major", "folder"), [(12, "nvidia/cublas/lib"), (13, "nvidia/cu13/lib")])
def test_cublas_of_a_wheel_is_found_without_pathfinder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, major: int, folder: str
) -> None:
    """CuPy 13 brings no finder of libraries: wheels of either CUDA are looked for as they unpack, before the loader."""
    library = tmp_path / folder / f"libcublas.so.{major}"
    library.parent.mkdir(parents=True)
    library.touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", None)
    listed = list(_list_libraries(major, maps=tmp_path / "none"))
    assert listed == [str(library), f"libcublas.so.{major}", f"/usr/local/cuda/lib64/libcublas.so.{major}"]
    maps = tmp_path / "maps"
    maps.write_text(f"7f00-7f01 r-xp 00000000 00:00 1 /opt/torch/libcublas.so.{major}\n")
    assert next(_list_libraries(major, maps)) == f"/opt/torch/libcublas.so.{major}"


def test_missing_cublas_is_told_with_the_wheel_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheel has another name for each CUDA, and every place that was tried is told."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", None)
    for major, wheel in ((98, "nvidia-cublas "), (7, "nvidia-cublas-cu12 ")):  # versions that no machine has
        with pytest.raises(DeviceError, match=rf"pip install {wheel}.*libcublas.so.{major}"):
            load_library(major)
