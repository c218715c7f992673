"""Compiles the CUDA kernels ahead of time, without a GPU: ``python -m worker.backends.kernels.build [--check]``.

NVRTC and nvFatbin come from wheels (``pip install 'glowplug[kernels]'``), so no CUDA toolkit is needed; ``nvcc`` is the
alternative where one is installed. ``--check`` compares digests only and needs no compiler.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from worker.backends.kernels.manifest import (
    FATBIN_NAME,
    MANIFEST_NAME,
    KernelManifest,
    KernelResources,
    StaleKernelsError,
    encode_manifest,
    load_manifest,
    verify_kernels,
)
from worker.backends.kernels.nvrtc import Compiled, KernelBuildError, Nvrtc, pack_fatbin
from worker.backends.kernels.sources import KERNELS_FOLDER, compute_source_digest, read_headers, translation_unit

#: What ships. 8.6 and 8.9 run the code of 8.0 (same major version); newer ones than listed compile the PTX.
SHIPPED_ARCHITECTURES: Final = (80, 90, 100, 120)
#: All that the kernels are known to compile for.
KNOWN_ARCHITECTURES: Final = (80, 86, 89, 90, 100, 120)
PTX_ARCHITECTURE: Final = 80

_OPTIONS: Final = ("-std=c++17",)
_RESOURCES: Final = re.compile(
    r"Compiling entry function '(\w+)' for '\w+'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)

Compile = Callable[[str], Compiled]


@dataclass(frozen=True, slots=True)
class BuiltKernels:
    """A fatbin and its manifest, not yet written."""

    fatbin: bytes
    manifest: KernelManifest

    def write(self, folder: Path) -> None:
        """Write both files to ``folder``; each replaces its old one at once."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in ((FATBIN_NAME, self.fatbin), (MANIFEST_NAME, encode_manifest(self.manifest))):
            partial = folder / f".{name}.partial"
            partial.write_bytes(content)
            partial.replace(folder / name)


def compile_with_nvrtc(target: str) -> Compiled:
    """Code for ``sm_80`` or PTX for ``compute_80``. About 6 s.

    Raises:
        KernelBuildError: see :class:`~worker.backends.kernels.nvrtc.Nvrtc`.
    """
    options = [f"--gpu-architecture={target}", *_OPTIONS]
    if target.startswith("sm_"):
        options.append("--ptxas-options=-v")
    return Nvrtc().compile("kernels.cu", translation_unit(), read_headers(), options)


def compile_with_nvcc(target: str) -> Compiled:
    """The same by the toolkit's compiler driver.

    Raises:
        KernelBuildError: it is not installed, or reports errors.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise KernelBuildError("nvcc is not on PATH")
    with tempfile.TemporaryDirectory() as folder:
        unit, out = Path(folder) / "kernels.cu", Path(folder) / "out"
        unit.write_bytes(translation_unit())
        kind = "-cubin" if target.startswith("sm_") else "-ptx"
        command = [nvcc, *_OPTIONS, f"-I{KERNELS_FOLDER}", f"-arch={target}", kind, "--resource-usage"]
        done = subprocess.run([*command, str(unit), "-o", str(out)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise KernelBuildError(f"nvcc {target} failed:\n{done.stdout}{done.stderr}")
        return Compiled(out.read_bytes(), done.stdout + done.stderr)


def parse_resources(log: str) -> dict[str, KernelResources]:
    """What ptxas said of each kernel in a verbose log."""
    return {
        found[1]: KernelResources(int(found[5]), int(found[2]), int(found[3]) + int(found[4]))
        for found in _RESOURCES.finditer(log)
    }


def choose_compiler(name: str) -> tuple[str, Compile]:
    """The compiler's version and how to call it. ``name``: ``nvrtc``, ``nvcc`` or ``auto`` (NVRTC if it is installed).

    Raises:
        KernelBuildError: none is installed.
    """
    if name != "nvcc":
        try:
            return Nvrtc().version, compile_with_nvrtc
        except KernelBuildError:
            if name == "nvrtc":
                raise
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise KernelBuildError("no CUDA compiler: pip install 'glowplug[kernels]' (NVRTC), or put nvcc on PATH")
    shown = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release ([\d.]+)", shown)
    return f"nvcc {found[1] if found else 'unknown'}", compile_with_nvcc


def build_kernels(
    architectures: Sequence[int] = SHIPPED_ARCHITECTURES,
    *,
    compiler: str = "auto",
    on_progress: Callable[[str], None] = lambda _line: None,
) -> BuiltKernels:
    """Compile all kernels for ``architectures`` and PTX, and pack them. About 6 s for each.

    Raises:
        KernelBuildError: no compiler, an architecture that it does not know, or errors in the sources.
    """
    version, compile_target = choose_compiler(compiler)
    cubins: dict[int, bytes] = {}
    resources: dict[str, dict[int, KernelResources]] = {}
    for architecture in sorted(set(architectures)):
        compiled = compile_target(f"sm_{architecture}")
        cubins[architecture] = compiled.code
        for kernel, found in sorted(parse_resources(compiled.log).items()):
            resources.setdefault(kernel, {})[architecture] = found
        on_progress(f"sm_{architecture}: {len(compiled.code)} bytes")
    ptx = compile_target(f"compute_{PTX_ARCHITECTURE}").code
    fatbin = pack_fatbin(cubins, {PTX_ARCHITECTURE: ptx})
    on_progress(f"fatbin: {len(fatbin)} bytes")
    digest = hashlib.sha256(fatbin).hexdigest()
    manifest = KernelManifest(
        version, compute_source_digest(), digest, tuple(sorted(cubins)), PTX_ARCHITECTURE, resources
    )
    return BuiltKernels(fatbin, manifest)


def main(arguments: list[str] | None = None) -> int:
    """Command line; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m worker.backends.kernels.build", description="Build the kernels.")
    parser.add_argument("--check", action="store_true", help="compare the shipped fatbin's digests; compiles nothing")
    options = parser.parse_args(arguments)
    try:
        if options.check:
            verify_kernels()
            manifest = load_manifest()
            print(f"kernels: up to date ({len(manifest.resources)} kernels, {manifest.describe_architectures()})")
        else:
            build_kernels(on_progress=print).write(KERNELS_FOLDER)
    except (KernelBuildError, StaleKernelsError) as error:
        print(f"kernels: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
