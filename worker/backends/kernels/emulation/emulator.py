"""Compiles the CUDA kernels for the CPU and launches them there: the same source, one fiber for each CUDA thread.

Every array argument is copied between guard pages for the launch, so an access past either end is an error that names
block and thread. What a launch leaves unwritten keeps what the array held: callers poison outputs first.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import subprocess
import sys
import tempfile
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from worker.backends.cuda_kernels import Launch
from worker.backends.kernels.sources import FAMILIES, KERNELS_FOLDER, read_headers

_FLAGS: Final = (
    *("-x", "c++", "-std=c++17", "-O2", "-g", "-fPIC", "-shared", "-nostdinc++", "-fno-exceptions", "-fno-rtti"),
    # Aliasing: device code reads words as other types. Contraction: no fused multiply-add, so results repeat.
    *("-fno-strict-aliasing", "-ffp-contract=off", "-fno-sanitize=all", "-DCUDA_ON_CPU"),
)
_MISALIGNED: Final = 16  # device allocations start at multiples of at least this
_GUARD_PAGES: Final = 16  # on each side of an argument
_SIGNATURE_DTYPES: Final[dict[str, type[np.int32 | np.int64 | np.float32]]] = {
    "i": np.int32,
    "l": np.int64,
    "f": np.float32,
}
_C_TYPES: Final[dict[str, Any]] = {"i": ctypes.c_int32, "l": ctypes.c_int64, "f": ctypes.c_float}

_LIBC: Final = ctypes.CDLL(None, use_errno=True)


class EmulationError(Exception):
    """A kernel did what no kernel may: diverged at a barrier, or touched memory that is not its own."""


class ThreadOrder(IntEnum):
    """Order in which the threads of a block (and its blocks) run between barriers."""

    ASCENDING = 0
    DESCENDING = 1
    RANDOM = 2


class _GuardedCopy:
    """An array's bytes between inaccessible pages: the end (rounded up to 16 bytes) touches one, the start lies at
    most a page after the other."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        if not array.flags.c_contiguous:
            raise ValueError("kernel arguments must be contiguous")
        page, guard_bytes = mmap.PAGESIZE, _GUARD_PAGES * mmap.PAGESIZE
        used = -(-max(array.nbytes, 1) // _MISALIGNED) * _MISALIGNED
        inner_bytes = -(-used // page) * page
        self._map = mmap.mmap(-1, inner_bytes + 2 * guard_bytes)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        for guard in (base, base + guard_bytes + inner_bytes):
            if _LIBC.mprotect(ctypes.c_void_p(guard), guard_bytes, 0) != 0:
                raise OSError(ctypes.get_errno(), "mprotect of a guard page")
        self.address = base + guard_bytes + inner_bytes - used
        self._slack = np.ctypeslib.as_array((ctypes.c_uint8 * used).from_address(self.address))
        self._slack[:] = 0xFF
        self._bytes = self._slack[: array.nbytes]
        self._array = array
        self._bytes[:] = array.reshape(-1).view(np.uint8)

    def copy_back(self) -> bool:
        """Give the array the kernel's result; False where bytes after its end were written."""
        if self._array.flags.writeable:
            self._array.reshape(-1).view(np.uint8)[:] = self._bytes
        return bool((self._slack[self._array.nbytes :] == 0xFF).all())


class KernelEmulator:
    """The kernels of one shared library, by name."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.emulation_name.restype = ctypes.c_char_p
        self._library.emulation_signature.restype = ctypes.c_char_p
        self._library.emulation_message.restype = ctypes.c_char_p
        self._library.emulation_switches.restype = ctypes.c_uint64
        self._library.emulation_launch.argtypes = [
            *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_uint)
        ]
        self._entries = {
            self._library.emulation_name(i).decode(): (i, self._library.emulation_signature(i).decode())
            for i in range(self._library.emulation_count())
        }
        self.launched: set[str] = set()
        self.num_launches = 0

    @property
    def kernels(self) -> frozenset[str]:
        """Names of all kernels."""
        return frozenset(self._entries)

    def launch(self, launch: Launch, order: ThreadOrder = ThreadOrder.ASCENDING) -> None:
        """Run ``launch``; array arguments hold the result afterwards. Blocks; not thread-safe.

        Raises:
            EmulationError: divergence at a barrier or warp collective, an access out of bounds, a misaligned vector
                access, or arguments that are not the kernel's.
        """
        if launch.kernel not in self._entries:
            raise EmulationError(f"no kernel is called {launch.kernel}")
        index, signature = self._entries[launch.kernel]
        if len(signature) != len(launch.arguments):
            raise EmulationError(f"{launch.kernel}: {len(launch.arguments)} arguments, not {len(signature)}")
        guarded: dict[int, _GuardedCopy] = {}
        cells = [
            self._cell(launch.kernel, position, letter, argument, guarded)
            for position, (letter, argument) in enumerate(zip(signature, launch.arguments, strict=True))
        ]
        pointers = (ctypes.c_void_p * len(cells))(*(ctypes.addressof(cell) for cell in cells))
        grid, block = (ctypes.c_uint * 3)(*launch.grid), (ctypes.c_uint * 3)(*launch.block)
        status = self._library.emulation_launch(index, pointers, grid, block, launch.shared_bytes, int(order))
        if status:
            raise EmulationError(f"{launch.kernel}: {self._library.emulation_message().decode()}")
        for copy in guarded.values():
            if not copy.copy_back():
                raise EmulationError(f"{launch.kernel}: wrote past the end of an argument")
        self.launched.add(launch.kernel)
        self.num_launches += 1

    @staticmethod
    def _cell(kernel: str, position: int, letter: str, argument: Any, guarded: dict[int, _GuardedCopy]) -> Any:
        if letter == "p":
            if isinstance(argument, np.ndarray):
                # One copy for an array that is passed twice: an operation in place must stay in place.
                start = argument.ctypes.data
                if start not in guarded:
                    guarded[start] = _GuardedCopy(argument)
                return ctypes.c_void_p(guarded[start].address)
            if argument is None or (isinstance(argument, int) and argument == 0):
                return ctypes.c_void_p(0)
        elif isinstance(argument, _SIGNATURE_DTYPES[letter]):
            return _C_TYPES[letter](argument.item())
        raise EmulationError(f"{kernel}: argument {position} is {type(argument).__name__}, the kernel's is {letter!r}")


def build_library(source: str, includes: Path, cache: Path) -> Path:
    """Compile C++ text with the ``ziglang`` wheel's compiler into ``cache``, once for each content; the library.

    Raises:
        EmulationError: the compiler reports errors; its output is in the message.
    """
    shim = includes / "emulation" / "cuda_on_cpu.h"
    digest = hashlib.sha256(repr((_FLAGS, source, shim.read_text(), sorted(read_headers().items()))).encode())
    library = cache / f"cuda-emulation-{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        unit, built = Path(folder) / "unit.cpp", Path(folder) / "unit.so"
        unit.write_text(source)
        command = [sys.executable, "-m", "ziglang", "cc", *_FLAGS, f"-I{includes}", str(unit), "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise EmulationError(f"compiling for the CPU failed:\n{done.stdout}{done.stderr}")
        os.replace(built, library)
    return library


def build_emulator(cache: Path) -> KernelEmulator:
    """The shipped kernels on the CPU. Takes about 15 s where ``cache`` has no current library.

    Raises:
        EmulationError: see :func:`build_library`.
    """
    source = "".join(f'#include "{family}.cu"\n' for family in FAMILIES)
    return KernelEmulator(build_library(source, KERNELS_FOLDER, cache))
