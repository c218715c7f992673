"""``python -m worker.benchmarks.chunk_table``: what chunk sizes and zstd levels cost, the choices behind both defaults.

Chunk sizes: digesting a blob in memory on one core and on all, sealing its file (page cache warm) on all cores, and
what zstd makes of it. Levels: every ``--stride``-th chunk of 1 MiB on one thread, in the time of that thread, so that
other work on the machine counts for little. ``--blob FILE`` takes a real blob, which compression needs: random bytes,
the default, do not shrink. Timings are medians, taken in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import zstandard

from snapshots import chunks
from snapshots.blob_reference import BlobRef
from snapshots.mapping import seal_blob
from snapshots.store import SnapshotStore
from snapshots.transport import DEFAULT_LEVEL

CHUNK_BYTES: Final = tuple(1 << power for power in (16, 18, 20, 21, 22, 24))
LEVELS: Final = (1, 3, 6, 9, 12, 19)


def measure_chunk_sizes(data: bytes, num_samples: int) -> list[dict[str, Any]]:
    """A row for each chunk size; times in ms."""
    with tempfile.TemporaryDirectory() as folder:
        store = SnapshotStore(Path(folder))
        refs = [store.add_blob_bytes(data, chunk_bytes=size) for size in CHUNK_BYTES]
        actions: dict[tuple[int, str], Callable[[], object]] = {}
        for ref in refs:
            size = ref.chunk_bytes
            actions[size, "digest_1_ms"] = partial(chunks.digest_chunks, data, size, num_threads=1)
            actions[size, "digest_all_ms"] = partial(chunks.digest_chunks, data, size)
            actions[size, "seal_all_ms"] = partial(_seal, store.blob_path(ref), ref)
        durations: dict[tuple[int, str], list[float]] = {key: [] for key in actions}
        for _ in range(num_samples):
            for key, action in actions.items():
                begin_ns = time.perf_counter_ns()
                action()
                durations[key].append((time.perf_counter_ns() - begin_ns) / 1e6)
    half = data[: len(data) // 2]
    return [
        {
            "chunk_bytes": size,
            **{name: round(statistics.median(durations[key, name]), 1) for key, name in actions if key == size},
            "zstd_share": round(_compressed_bytes(half, size, 1)[0] / len(half), 4),
        }
        for size in CHUNK_BYTES
    ]


def _seal(path: Path, ref: BlobRef) -> None:
    seal_blob(path, ref).close()


def _compressed_bytes(data: bytes, chunk_bytes: int, stride: int, level: int = DEFAULT_LEVEL) -> tuple[int, int, int]:
    """Size of every ``stride``-th chunk compressed, and the thread's nanoseconds of compressing and decompressing."""
    compressor, decompressor = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()
    size_bytes = compress_ns = decompress_ns = 0
    for start in range(0, len(data), chunk_bytes * stride):
        chunk = data[start : start + chunk_bytes]
        begin_ns = time.thread_time_ns()
        packed = compressor.compress(chunk)
        packed_ns = time.thread_time_ns()
        decompressor.decompress(packed)
        decompress_ns += time.thread_time_ns() - packed_ns
        compress_ns += packed_ns - begin_ns
        size_bytes += len(packed)
    return size_bytes, compress_ns, decompress_ns


def measure_levels(data: bytes, stride: int) -> list[dict[str, Any]]:
    """A row for each level; MB/s of plain bytes."""
    size = chunks.DEFAULT_CHUNK_BYTES
    plain_bytes = sum(len(data[start : start + size]) for start in range(0, len(data), size * stride))
    rows = []
    for level in LEVELS:
        packed_bytes, compress_ns, decompress_ns = _compressed_bytes(data, size, stride, level)
        rows.append(
            {
                "level": level,
                "zstd_share": round(packed_bytes / plain_bytes, 4),
                "compress_mb_per_s": round(plain_bytes * 1000 / max(compress_ns, 1)),
                "decompress_mb_per_s": round(plain_bytes * 1000 / max(decompress_ns, 1)),
            }
        )
    return rows


def show(results: dict[str, Any]) -> list[str]:
    """Both tables, in lines of Markdown."""
    lines = ["| chunk | digest, 1 core | digest, all | seal, all | zstd |", "|---|---|---|---|---|"]
    for row in results["chunk_sizes"]:
        times = " | ".join(f"{row[name]:.0f} ms" for name in ("digest_1_ms", "digest_all_ms", "seal_all_ms"))
        lines.append(f"| {row['chunk_bytes'] >> 10} KiB | {times} | {row['zstd_share']:.1%} |")
    lines += ["", "| level | size | compress | decompress |", "|---|---|---|---|"]
    for row in results["levels"]:
        rates = f"{row['compress_mb_per_s']} MB/s | {row['decompress_mb_per_s']} MB/s"
        lines.append(f"| {row['level']} | {row['zstd_share']:.1%} | {rates} |")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Command line; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m worker.benchmarks.chunk_table", description=__doc__)
    parser.add_argument("--blob", type=Path, metavar="FILE", help="a blob of a store that is not encrypted")
    parser.add_argument("--mib", type=int, default=256, help="random bytes instead (default: 256)")
    parser.add_argument("--samples", type=int, default=7, help="of each chunk size (default: 7)")
    parser.add_argument("--stride", type=int, default=8, help="levels: every so many chunks (default: 8)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    data = options.blob.read_bytes() if options.blob else np.random.default_rng(1).bytes(options.mib << 20)
    results = {
        "size_bytes": len(data),
        "chunk_sizes": measure_chunk_sizes(data, options.samples),
        "levels": measure_levels(data, options.stride),
    }
    print("\n".join(show(results)))
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
