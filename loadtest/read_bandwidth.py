"""How fast this machine reads memory: the ceiling of a decode step, which reads every weight once."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
import numpy.typing as npt

BUFFER_BYTES: Final = 512 * 1024 * 1024  # more than any cache that one guest of a shared machine gets
BLOCK_ELEMENTS: Final = 65_536
ROUNDS: Final = 5


def measure_read_bandwidth(num_threads: int | None = None) -> float:
    """GB/s at which ``num_threads`` threads (default: one for each usable core) read memory; the best of five rounds.

    Each thread takes the maximum of its own share, block by block: one load and one compare an element.
    """
    num_threads = num_threads or len(os.sched_getaffinity(0))
    buffer = np.ones(BUFFER_BYTES // 8, np.int64)
    shares = np.array_split(buffer, num_threads)
    best = 0.0
    with ThreadPoolExecutor(num_threads, thread_name_prefix="read") as pool:
        for _ in range(ROUNDS):
            started_s = time.perf_counter()
            list(pool.map(_read, shares))
            best = max(best, buffer.nbytes / (time.perf_counter() - started_s) / 1e9)
    return best


def _read(share: npt.NDArray[np.int64]) -> None:
    for begin in range(0, len(share), BLOCK_ELEMENTS):
        share[begin : begin + BLOCK_ELEMENTS].max()
