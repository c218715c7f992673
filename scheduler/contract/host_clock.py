"""Which monotonic clock this process reads: marks of two processes compare only if it is the same one.

CLOCK_MONOTONIC counts from the kernel's boot, and in a time namespace from elsewhere.
Source: clock_gettime(2), time_namespaces(7), random(4).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_TIME_NAMESPACE: Final = "/proc/self/ns/time"
_BOOT_ID_CHARS: Final = 13  # of 36: 48 random bits


def read_clock_id() -> str:
    """A short name of this process's monotonic clock; empty where the kernel does not tell."""
    try:
        boot_id = _BOOT_ID.read_text()[:_BOOT_ID_CHARS]
    except OSError:
        return ""
    try:
        namespace = os.readlink(_TIME_NAMESPACE)
    except OSError:  # a kernel without time namespaces
        namespace = ""
    return f"{boot_id}/{re.sub(r'[^0-9]', '', namespace)}"


#: Read once, when first imported: a worker inherits it from its zygote and pays nothing.
CLOCK_ID: Final = read_clock_id()
