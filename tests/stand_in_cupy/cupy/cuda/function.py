"""Modules and kernels of the stand-in: the shipped kernels on the CPU, with raw addresses."""

import ctypes
import functools
from pathlib import Path

import numpy as np

from cupy.cuda import runtime
from worker.backends.kernels.emulation.emulator import build_emulator

CACHE = Path(__file__).resolve().parents[4] / ".cache" / "kernels"
_TYPES = {"i": (np.int32, ctypes.c_int), "l": (np.int64, ctypes.c_longlong), "f": (np.float32, ctypes.c_float)}


@functools.cache
def _emulator():
    return build_emulator(CACHE)


class Module:
    """A fatbin; its bytes are looked at, its code is not run."""

    def __init__(self):
        self.ptr = 0

    def load(self, cubin):
        if not isinstance(cubin, bytes) or cubin[:4] != b"\x50\xed\x55\xba":
            raise runtime.CUDARuntimeError(200)
        self.ptr = runtime.new_handle()

    def get_function(self, name):
        if name not in _emulator().kernels:
            raise runtime.CUDARuntimeError(500)
        return Function(self, name)


class Function:
    """A kernel."""

    def __init__(self, module, funcname):
        self.module, self.name = module, funcname
        self.index, self.signature = _emulator()._entries[funcname]

    def __call__(self, grid, block, args, shared_mem=0, stream=None, enable_cooperative_groups=False):
        if type(grid) is not tuple or type(block) is not tuple:
            raise TypeError("grid and block are tuples")
        if len(args) != len(self.signature):
            raise RuntimeError(f"{self.name}: {len(args)} arguments, not {len(self.signature)}")
        cells = [self._cell(letter, value) for letter, value in zip(self.signature, args, strict=True)]
        grid, block = ((*sizes, 1, 1)[:3] for sizes in (grid, block))
        if max(grid[1:]) > 65535 or min(*grid, *block) < 1 or shared_mem > 48 * 1024:
            raise runtime.CUDARuntimeError(1)

        def launch():
            library = _emulator()._library
            pointers = (ctypes.c_void_p * len(cells))(*map(ctypes.addressof, cells))
            sizes = (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block)
            if library.emulation_launch(self.index, pointers, *sizes, shared_mem, 0):
                raise RuntimeError(f"{self.name}: {library.emulation_message().decode()}")

        runtime.run(stream.ptr, launch)

    def _cell(self, letter, value):
        if letter == "p":
            if type(value) is not np.int64:
                raise TypeError(f"{self.name}: a pointer given as {type(value)}")
            if value:
                runtime.check_range(int(value), 1)
            return ctypes.c_void_p(int(value))
        dtype, cell = _TYPES[letter]
        if type(value) is not dtype:
            raise TypeError(f"{self.name}: {type(value)} where the kernel takes {dtype}")
        return cell(value.item())
