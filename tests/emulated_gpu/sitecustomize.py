"""Gives every Python process that has this folder in PYTHONPATH an emulated GPU where the backend looks for CuPy's."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Emulated(ModuleType):
    """In the place of ``worker.backends.cuda.cupy_device``; imports nothing before a worker opens its device."""

    def __getattr__(self, name: str) -> Any:
        if name != "CupyDevice":
            raise AttributeError(name)
        from governed_device import open_emulated

        return open_emulated


sys.modules["worker.backends.cuda.cupy_device"] = _Emulated("worker.backends.cuda.cupy_device")
