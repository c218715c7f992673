"""The shipped fatbin is of these sources, and the sources compile ahead of time, without a GPU."""

from __future__ import annotations

import re
import shutil
import struct
from pathlib import Path

import pytest
from click.testing import CliRunner
from cuda_fixtures import CACHE_FOLDER, emulator

from worker.backends.kernels import build, sanitizer
from worker.backends.kernels.command import kernels as command
from worker.backends.kernels.manifest import (
    FATBIN_NAME,
    MANIFEST_NAME,
    KernelManifest,
    StaleKernelsError,
    load_manifest,
    verify_kernels,
)
from worker.backends.kernels.nvrtc import KernelBuildError, Nvrtc
from worker.backends.kernels.sources import KERNELS_FOLDER, compute_source_digest

FATBIN_MAGIC = 0xBA55ED50
LARGEST_FATBIN_BYTES = 5 << 18


def compiler_or_none() -> str | None:
    """The compiler of this machine, if it has one."""
    try:
        return build.choose_compiler("auto")[0]
    except KernelBuildError:
        return None


def test_the_shipped_fatbin_is_of_these_sources() -> None:
    """Digests of sources and fatbin equal the manifest's; the file is a fatbin of at most 1.25 MiB."""
    path = verify_kernels()
    content = path.read_bytes()
    assert struct.unpack_from("<I", content)[0] == FATBIN_MAGIC
    assert len(content) <= LARGEST_FATBIN_BYTES
    manifest = load_manifest()
    assert manifest.architectures == build.SHIPPED_ARCHITECTURES
    assert set(manifest.resources) == emulator().kernels  # every kernel that the emulator runs is in the fatbin


def test_no_kernel_spills() -> None:
    """No kernel spills registers on any shipped architecture, and only sine and cosine use a stack."""
    for kernel, by_architecture in load_manifest().resources.items():
        assert set(by_architecture) == set(build.SHIPPED_ARCHITECTURES), kernel
        for found in by_architecture.values():
            assert found.spill_bytes == 0, kernel
            assert found.stack_bytes == 0 or kernel == "rope_table", kernel
            assert found.registers <= 255


@pytest.mark.parametrize("architecture", build.KNOWN_ARCHITECTURES)
def test_the_sources_compile_or_are_refused(architecture: int) -> None:
    """With a compiler, machine code for every known architecture, spills none; without one, what to install.

    What compiled once is not compiled again until the sources change.
    """
    version = compiler_or_none()
    if version is None:
        with pytest.raises(KernelBuildError, match=re.escape("pip install 'glowplug[kernels]'")):
            build.build_kernels([architecture])
        return
    marker = CACHE_FOLDER / f"{compute_source_digest()[:16]}-{version.replace(' ', '-')}-sm_{architecture}.log"
    if not marker.exists():
        compiled = build.choose_compiler("auto")[1](f"sm_{architecture}")
        assert compiled.code[:4] == b"\x7fELF"
        CACHE_FOLDER.mkdir(parents=True, exist_ok=True)
        marker.write_text(compiled.log)
    resources = build.parse_resources(marker.read_text())
    assert set(resources) == emulator().kernels
    assert not any(found.spill_bytes for found in resources.values())


def test_a_missing_compiler_is_a_clean_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither wheel nor nvcc: the error names both, for the library and for the command."""
    monkeypatch.setattr("worker.backends.kernels.nvrtc.importlib.util.find_spec", lambda _name: None)
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(KernelBuildError, match="NVRTC is not installed: pip install"):
        Nvrtc()
    with pytest.raises(KernelBuildError, match=r"no CUDA compiler: .* or put nvcc on PATH"):
        build.build_kernels()
    with pytest.raises(KernelBuildError, match="nvcc is not on PATH"):
        build.compile_with_nvcc("sm_80")
    done = CliRunner().invoke(command, ["build"])
    assert done.exit_code == 1
    assert "no CUDA compiler" in done.output


def test_stale_kernels_are_named(tmp_path: Path) -> None:
    """A changed fatbin, changed sources and a missing or broken manifest are each refused with the remedy."""
    for name in (FATBIN_NAME, MANIFEST_NAME):
        shutil.copy(KERNELS_FOLDER / name, tmp_path)
    assert verify_kernels(tmp_path) == tmp_path / FATBIN_NAME
    with pytest.raises(StaleKernelsError, match=r"was built from sources .* run `glowplug kernels build`"):
        verify_kernels(tmp_path, source_digest="0" * 64)
    changed = bytearray((tmp_path / FATBIN_NAME).read_bytes())
    changed[1000] ^= 1
    (tmp_path / FATBIN_NAME).write_bytes(changed)
    with pytest.raises(StaleKernelsError, match=r"has digest .* its manifest says"):
        verify_kernels(tmp_path)
    (tmp_path / FATBIN_NAME).unlink()
    with pytest.raises(StaleKernelsError, match="No such file"):
        verify_kernels(tmp_path)
    (tmp_path / MANIFEST_NAME).write_text("{}")
    with pytest.raises(StaleKernelsError, match=r"kernels\.json: .*compiler"):
        load_manifest(tmp_path)


def test_which_devices_the_fatbin_runs_on() -> None:
    """Machine code serves its major version from its minor version on; PTX everything newer; nothing older."""
    manifest = KernelManifest("NVRTC", "", "", (80, 90), 80, {})
    assert [manifest.runs_on(a) for a in (75, 80, 89, 90, 100, 121)] == [False, True, True, True, True, True]
    assert [manifest.needs_driver_compiler(a) for a in (86, 90, 120)] == [False, False, True]


def test_the_command(tmp_path: Path) -> None:
    """check and show read what ships; architectures that are unknown are refused before compiling."""
    runner = CliRunner()
    checked = runner.invoke(command, ["check"])
    assert checked.exit_code == 0, checked.output
    assert "sm_80, sm_90, sm_100, sm_120 and PTX of compute_80: up to date" in checked.output
    assert "rms_norm_bf16" in runner.invoke(command, ["show"], env={"COLUMNS": "200"}).output
    refused = runner.invoke(command, ["build", "--arch", "80,75", "--out", str(tmp_path)])
    assert refused.exit_code == 2
    assert "[75]: the kernels compile for 80, 86" in refused.output
    assert build.main(["--check"]) == 0


def test_every_family_is_in_the_module() -> None:
    """No source file is left out of the translation unit, by itself or through another."""
    included = set(re.findall(r'#include "(\w+\.cuh?)"', build.translation_unit().decode()))
    for text in build.read_headers().values():
        included |= set(re.findall(r'#include "(\w+\.cuh?)"', text.decode()))
    assert included == set(build.read_headers())


FAKE_SANITIZER = """#!/bin/sh
echo "========= COMPUTE-SANITIZER"
echo "========= $2"
case "$*" in
  *bad*) echo "========= Invalid __global__ read of size 4 bytes"; echo "========= ERROR SUMMARY: 3 errors"; exit 86;;
  *silent*) exit 1;;
  *slow*) exec sleep 60;;
  *) echo "========= ERROR SUMMARY: 0 errors"; exit 0;;
esac
"""


def test_the_sanitizer_is_found_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its summary is the verdict; no summary is no verdict; what takes too long is killed."""
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(FAKE_SANITIZER)
    tool.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert sanitizer.find_sanitizer() == tool
    clean = sanitizer.run_sanitizer(tool, "memcheck", ["python"], limit_s=20)
    assert clean.is_clean
    assert "memcheck" in clean.output
    bad = sanitizer.run_sanitizer(tool, "racecheck", ["bad"], limit_s=20)
    assert (bad.num_errors, bad.exit_code, bad.is_clean) == (3, 86, False)
    assert sanitizer.run_sanitizer(tool, "memcheck", ["silent"], limit_s=20).num_errors is None
    with pytest.raises(TimeoutError, match="not done after 0 s"):
        sanitizer.run_sanitizer(tool, "memcheck", ["slow"], limit_s=0.2)
    with pytest.raises(ValueError, match="compute-sanitizer has memcheck"):
        sanitizer.sanitizer_command(tool, "guess", [])
