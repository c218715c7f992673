"""NVRTC and nvFatbin through ctypes, from the ``nvidia-cuda-nvrtc`` and ``nvidia-nvfatbin`` wheels: no driver, no GPU.

The wheels of CUDA 12 are preferred: code built with 12.9 loads on every driver since 12.0 and on those of 13.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final


class KernelBuildError(Exception):
    """The kernels could not be built; the message holds the compiler's log, or says what is missing."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """Code for one architecture and what ptxas said about it."""

    code: bytes
    log: str


#: Folders of the wheels (CUDA 12, CUDA 13) below the ``nvidia`` namespace package.
_NVRTC_FOLDERS: Final = ("cuda_nvrtc/lib", "cu13/lib")
_FATBIN_FOLDERS: Final = ("nvfatbin/lib", "cu13/lib")


def find_library(stem: str, folders: Sequence[str]) -> Path | None:
    """``lib<stem>.so.<major>`` of an installed NVIDIA wheel, or None."""
    spec = importlib.util.find_spec("nvidia")
    if spec is None or spec.submodule_search_locations is None:
        return None
    for root in spec.submodule_search_locations:
        for folder in folders:
            found = sorted(
                path
                for path in (Path(root) / folder).glob(f"lib{stem}.so.*")
                if path.name.removeprefix(f"lib{stem}.so.").isdigit()
            )
            if found:
                return found[0]
    return None


class Nvrtc:
    """The run-time compiler used ahead of time.

    Raises:
        KernelBuildError: the wheel is not installed.
    """

    def __init__(self) -> None:
        path = find_library("nvrtc", _NVRTC_FOLDERS)
        if path is None:
            raise KernelBuildError("NVRTC is not installed: pip install 'glowplug[kernels]'")
        self._library = ctypes.CDLL(str(path))
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        self.version = f"NVRTC {major.value}.{minor.value}"

    def supported_architectures(self) -> tuple[int, ...]:
        """Compute capabilities (80 for 8.0) that this version knows."""
        count = ctypes.c_int()
        self._check(self._library.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
        found = (ctypes.c_int * count.value)()
        self._check(self._library.nvrtcGetSupportedArchs(found))
        return tuple(found)

    def compile(self, name: str, source: bytes, headers: dict[str, bytes], options: Sequence[str]) -> Compiled:
        """Compile to a cubin (``--gpu-architecture=sm_80``) or PTX (``compute_80``).

        Raises:
            KernelBuildError: the source has errors; the log is in the message.
        """
        program = ctypes.c_void_p()
        texts = (ctypes.c_char_p * len(headers))(*headers.values())
        names = (ctypes.c_char_p * len(headers))(*(key.encode() for key in headers))
        self._check(
            self._library.nvrtcCreateProgram(
                ctypes.byref(program), ctypes.c_char_p(source), name.encode(), len(headers), texts, names
            )
        )
        try:
            flags = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            status = self._library.nvrtcCompileProgram(program, len(options), flags)
            log = self._read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            if status:
                raise KernelBuildError(f"compiling {name} with {' '.join(options)} failed:\n{log}")
            is_cubin = any("=sm_" in option for option in options)
            return Compiled(self._read(program, "CUBIN" if is_cubin else "PTX"), log)
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, f"nvrtcGet{what}")(program, buffer))
        return buffer.raw

    def _check(self, status: int) -> None:
        if status:
            self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise KernelBuildError(f"NVRTC: {self._library.nvrtcGetErrorString(status).decode()}")


def pack_fatbin(cubins: dict[int, bytes], ptx: dict[int, bytes]) -> bytes:
    """One fatbin of cubins and PTX by architecture, compressed for size.

    Raises:
        KernelBuildError: the nvFatbin wheel is not installed, or refuses the code.
    """
    path = find_library("nvfatbin", _FATBIN_FOLDERS)
    if path is None:
        raise KernelBuildError("nvFatbin is not installed: pip install 'glowplug[kernels]'")
    library = ctypes.CDLL(str(path))

    def check(status: int) -> None:
        if status:
            library.nvFatbinGetErrorString.restype = ctypes.c_char_p
            raise KernelBuildError(f"nvFatbin: {library.nvFatbinGetErrorString(status).decode()}")

    options = (b"-64", b"-compress=true", b"-compress-mode=size")
    handle = ctypes.c_void_p()
    check(library.nvFatbinCreate(ctypes.byref(handle), (ctypes.c_char_p * len(options))(*options), len(options)))
    try:
        for architecture, code in sorted(cubins.items()):
            check(library.nvFatbinAddCubin(handle, code, ctypes.c_size_t(len(code)), b"%d" % architecture, None))
        for architecture, code in sorted(ptx.items()):
            check(library.nvFatbinAddPTX(handle, code, ctypes.c_size_t(len(code)), b"%d" % architecture, None, None))
        size = ctypes.c_size_t()
        check(library.nvFatbinSize(handle, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        check(library.nvFatbinGet(handle, buffer))
        return buffer.raw
    finally:
        library.nvFatbinDestroy(ctypes.byref(handle))
