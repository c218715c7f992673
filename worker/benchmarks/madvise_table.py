"""``python -m worker.benchmarks.madvise_table``: what each madvise choice costs a worker over sealed weights.

A worker maps sealed memory, gives the advice, and reads every page once in order, as a first token does; the reading of
one byte a page shows the faults and nothing else. Sealed memory with huge pages and, for comparison, with 4 KiB pages,
and the file itself on its disk with nothing of it in the page cache, which is what a design without sealed memory
would map and where the advice matters.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import numpy as np

from snapshots import sealing
from snapshots.mapping import MADV_POPULATE_READ, PAGE_BYTES, map_sealed, seal_blob
from snapshots.store import SnapshotStore
from worker.benchmarks.measurements import summarize

NO_ADVICE: Final = -1
ADVICES: Final = {
    "none": NO_ADVICE,
    "POPULATE_READ": MADV_POPULATE_READ,
    "WILLNEED": mmap.MADV_WILLNEED,
    "SEQUENTIAL": mmap.MADV_SEQUENTIAL,
    "RANDOM": mmap.MADV_RANDOM,
    "HUGEPAGE": mmap.MADV_HUGEPAGE,  # given by map_sealed already: shows what a second call costs
}
_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def measure(fd: int, size_bytes: int, advice: int) -> tuple[int, int]:
    """Nanoseconds of the advice, and of mapping, advice and reading together."""
    begin_ns = time.perf_counter_ns()
    with map_sealed(fd, size_bytes) as mapped:
        advised_ns = time.perf_counter_ns()
        if advice != NO_ADVICE:
            _libc.madvise(mapped.address, size_bytes, advice)
        advice_ns = time.perf_counter_ns() - advised_ns
        int(mapped.array(np.uint8, (size_bytes,))[::PAGE_BYTES].max())
        return advice_ns, time.perf_counter_ns() - begin_ns


def measure_cold(path: Path, advice: int) -> tuple[int, int]:
    """The same of the file, dropped from the page cache before."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size_bytes = os.fstat(fd).st_size
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        begin_ns = time.perf_counter_ns()
        with mmap.mmap(fd, size_bytes, prot=mmap.PROT_READ) as mapped:
            data = np.frombuffer(mapped, np.uint8)
            advised_ns = time.perf_counter_ns()
            if advice != NO_ADVICE:
                _libc.madvise(data.ctypes.data, size_bytes, advice)
            advice_ns = time.perf_counter_ns() - advised_ns
            int(data[::PAGE_BYTES].max())
            end_ns = time.perf_counter_ns()
            del data
        return advice_ns, end_ns - begin_ns
    finally:
        os.close(fd)


def measure_in_turn(
    measure_one: Callable[[int], tuple[int, int]], num_samples: int, pages: str
) -> list[dict[str, Any]]:
    """A row for each advice; in turn, so that other work on the machine meets all of them."""
    durations: dict[str, list[tuple[int, int]]] = {name: [] for name in ADVICES}
    for _ in range(num_samples):
        for name, advice in ADVICES.items():
            durations[name].append(measure_one(advice))
    rows = []
    for name, pairs in durations.items():
        advice_us, total = (summarize([pair[i] for pair in pairs]) for i in (0, 1))
        rows.append({"pages": pages, "advice": name, "call": advice_us.as_json(), "total": total.as_json()})
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Command line; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m worker.benchmarks.madvise_table", description=__doc__)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--cold", type=int, default=5, help="samples of the file on disk (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        store = SnapshotStore(Path(folder))
        ref = store.add_blob_bytes(np.random.default_rng(1).bytes(options.mib << 20))
        for pages, collapse in (("2 MiB", sealing.MADV_COLLAPSE), ("4 KiB", NO_ADVICE)):
            with patch.object(sealing, "MADV_COLLAPSE", collapse), seal_blob(store.blob_path(ref), ref) as sealed:
                take = partial(measure, sealed.fd, ref.size_bytes)
                rows += measure_in_turn(take, options.samples, pages)
        rows += measure_in_turn(partial(measure_cold, store.blob_path(ref)), options.cold, "file, cold")
    print("| pages | advice | the call, P50 us | map + advice + first read, P50 / P99 us |\n|---|---|---|---|")
    for row in rows:
        total_us = f"{row['total']['p50_us']:.0f} / {row['total']['p99_us']:.0f}"
        print(f"| {row['pages']} | {row['advice']} | {row['call']['p50_us']:.0f} | {total_us} |")
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
