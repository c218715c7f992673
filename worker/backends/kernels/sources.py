"""The kernels' source files and their digest."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

KERNELS_FOLDER: Final = Path(__file__).parent

#: The translation unit: every family, in one module.
FAMILIES: Final = ("normalise", "rotary", "elementwise", "linear", "attention", "prefill", "sampling")


def read_headers() -> dict[str, bytes]:
    """Every source by file name, in a fixed order."""
    paths = sorted([*KERNELS_FOLDER.glob("*.cu"), *KERNELS_FOLDER.glob("*.cuh")])
    return {path.name: path.read_bytes() for path in paths}


def translation_unit() -> bytes:
    """The file that includes all families."""
    return "".join(f'#include "{family}.cu"\n' for family in FAMILIES).encode()


def compute_source_digest() -> str:
    """SHA-256, as hexadecimal digits, of all sources with their names and lengths."""
    digest = hashlib.sha256(translation_unit())
    for name, text in read_headers().items():
        digest.update(f"{name} {len(text)}\n".encode())
        digest.update(text)
    return digest.hexdigest()
