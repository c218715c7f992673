"""``python -m worker.benchmarks.guest_restore``: how long until a restored guest gives its first result.

For each snapshot size a guest with a table of that size is initialised, baked, compiled and stored. Then two things are
measured, phase by phase:

* *verified once on this host*: sealed memory is there, as an agent holds it; a worker maps it, decodes (deserialises)
  the code, instantiates, resumes and gets its first answer out of the table. The guest engine exists, as the zygote
  made it. Nothing is read, decompressed, verified or copied.
* *first verification on this host*: the file is in the page cache; it is copied into sealed memory and every chunk is
  digested there, on all cores at once (``read_copy_verify_seal``), then all of the above. Reading, copying, verifying
  and decompressing are also measured alone, the last two on one core. Decompressing is what an import adds, of zstd at
  its default level: compiled guests lie plain in a store, so it is no part of the total.

Every answer is compared with what init wrote.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import zstandard

from guests.compile import compile_guest, guest_identity
from guests.initialise import initialise_guest
from guests.runtime import GuestEngine, GuestInstance
from guests.shipped import table_wasm
from guests.signatures import IMPORTS
from snapshots import chunks
from snapshots.blob_reference import BlobRef
from snapshots.cold_reading import ColdReader
from snapshots.mapping import map_sealed, seal_blob
from snapshots.store import SnapshotStore
from snapshots.stored_chunks import StoredChunks
from snapshots.transport import DEFAULT_LEVEL
from worker.benchmarks.measurements import summarize

SIZES_MIB: Final = (1, 16, 128)
FULL_SIZES_MIB: Final = (*SIZES_MIB, 511)  # with its own pages, 512: all that a guest may have
MULTIPLIER: Final = 0x9E3779B97F4A7C15  # of the table's entries, as in guests/examples/table.c
CALLS: Final = 10_000  # of one bench_* export
#: size in MiB -> the published estimate: P50, P95, P99 in ms
ESTIMATES_MS: Final = {1: (5, 9, 14), 16: (22, 38, 55), 128: (65, 120, 180), 511: (150, 280, 420)}
PHASES: Final = ("map", "decode", "instantiate", "resume", "first_call")
#: Alone, of the whole file; and what sealing does of them at once.
FIRST_PHASES: Final = ("read", "decompress", "verify", "copy", "read_copy_verify_seal")


class Snapshot:
    """A compiled guest of one size in a store. ``ref`` addresses its blob."""

    def __init__(self, store: SnapshotStore, size_mib: int) -> None:
        self.size_mib = size_mib
        guest = initialise_guest(table_wasm(), {"size": struct.pack("<I", size_mib)}, [])
        self.ref: BlobRef = store.add_blob_bytes(compile_guest(guest.baked_wasm))
        self.path: Path = store.blob_path(self.ref)

    def compress(self) -> list[bytes]:
        """Its chunks as they lie in a transport file."""
        compressor = zstandard.ZstdCompressor(level=DEFAULT_LEVEL)
        with self.path.open("rb", buffering=0) as file:
            return [compressor.compress(chunk) for chunk in iter(lambda: file.read(self.ref.chunk_bytes), b"")]


def measure_restores(engine: GuestEngine, fd: int, snapshot: Snapshot, num_samples: int) -> dict[str, list[int]]:
    """Nanoseconds of each phase and of all, with sealed memory at hand."""
    durations: dict[str, list[int]] = {phase: [] for phase in (*PHASES, "total")}
    for number in range(num_samples):
        index = number * 7919 % (snapshot.size_mib << 17)
        marks = [time.perf_counter_ns()]
        with map_sealed(fd, snapshot.ref.size_bytes):  # checks seals and size, as worker.restore does
            marks.append(time.perf_counter_ns())
            module = engine.load(f"/proc/self/fd/{fd}")
        marks.append(time.perf_counter_ns())
        instance = module.instantiate()
        marks.append(time.perf_counter_ns())
        instance.call("gp_resume", number)
        marks.append(time.perf_counter_ns())
        answer = instance.read(instance.call("gp_token_bytes", index) >> 32, 8)
        marks.append(time.perf_counter_ns())
        instance.close()
        module.close()
        if answer != struct.pack("<Q", (index + 1) * MULTIPLIER & (1 << 64) - 1):
            raise AssertionError(f"entry {index} of the {snapshot.size_mib} MiB guest is wrong")
        for phase, start, end in zip(PHASES, marks, marks[1:], strict=False):
            durations[phase].append(end - start)
        durations["total"].append(marks[-1] - marks[0])
    return durations


def measure_first_verifications(engine: GuestEngine, snapshot: Snapshot, num_samples: int) -> dict[str, list[int]]:
    """Nanoseconds of each phase alone, and of sealing with verification up to the first result, with its phases."""
    durations: dict[str, list[int]] = {name: [] for name in (*FIRST_PHASES, *PHASES, "total")}
    compressed = snapshot.compress()
    for _ in range(num_samples):
        durations["read"].append(_time_of(lambda: _read_through(snapshot.path)))
        durations["decompress"].append(_time_of(lambda: _decompress_through(compressed)))
        durations["verify"].append(_digest_through(snapshot))
        durations["copy"].append(_time_of(lambda: _copy_through(snapshot)))
        start = time.perf_counter_ns()
        with seal_blob(snapshot.path, snapshot.ref, label="benchmark") as sealed:
            sealed_at = time.perf_counter_ns()
            restored = measure_restores(engine, sealed.fd, snapshot, 1)
        durations["read_copy_verify_seal"].append(sealed_at - start)
        for phase in PHASES:
            durations[phase] += restored[phase]
        durations["total"].append(sealed_at - start + restored["total"][0])
    return durations


def _time_of(action: Callable[[], object]) -> int:
    start = time.perf_counter_ns()
    action()
    return time.perf_counter_ns() - start


def _read_through(path: Path) -> None:
    buffer = bytearray(4 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _decompress_through(compressed: list[bytes]) -> None:
    decompressor = zstandard.ZstdDecompressor()
    for chunk in compressed:
        decompressor.decompress(chunk)


def _copy_through(snapshot: Snapshot) -> None:
    """Into sealed memory on all cores, as it is: only here does nothing look at the digests."""

    def read_unverified(stored: StoredChunks, fd: int, index: int, into: memoryview, _cold: ColdReader | None) -> None:
        stored._read_fully(fd, index, into)

    with patch.object(StoredChunks, "read_into", read_unverified):
        seal_blob(snapshot.path, snapshot.ref, label="benchmark").close()


def _digest_through(snapshot: Snapshot) -> int:
    """Nanoseconds of digesting alone, on one core, each chunk just read; sealing does it on all."""
    buffer = bytearray(snapshot.ref.chunk_bytes)
    spent_ns = 0
    with snapshot.path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            begin_ns = time.perf_counter_ns()
            chunks.digest_chunk(memoryview(buffer)[:size])
            spent_ns += time.perf_counter_ns() - begin_ns
    return spent_ns


def measure_calls(snapshot: Snapshot, num_samples: int) -> dict[str, list[int]]:
    """Nanoseconds of one guest call and of one host call, each the mean of many: a clock reading costs as much."""
    durations: dict[str, list[int]] = {name: [] for name in ("guest_call", "host_call_3", "host_call_5")}
    with (
        GuestEngine(dict.fromkeys(IMPORTS, _answer)) as engine,
        seal_blob(snapshot.path, snapshot.ref, label="benchmark") as sealed,
    ):
        module = engine.load(f"/proc/self/fd/{sealed.fd}")
        with module.instantiate() as instance:
            for _ in range(num_samples):
                durations["guest_call"].append(_time_of(lambda: _call_often(instance)) // 1000)
            for _ in range(num_samples):
                durations["host_call_3"].append(_time_of(lambda: instance.call_unlisted("bench_log")) // CALLS)
                durations["host_call_5"].append(_time_of(lambda: instance.call_unlisted("bench_asset_read")) // CALLS)
        module.close()
    return durations


def _answer(_memory: object, *_arguments: int) -> int:
    return 0


def _call_often(instance: GuestInstance) -> None:
    call = instance.call
    for index in range(1000):
        call("gp_token_bytes", index)


def measure(sizes_mib: tuple[int, ...], num_samples: int, num_first: int, folder: Path) -> dict[str, Any]:
    """Everything, as JSON."""
    store = SnapshotStore(folder)
    results: dict[str, Any] = {"machine": describe_machine(), "identity": guest_identity(), "sizes": []}
    with GuestEngine() as engine:
        for size_mib in sizes_mib:
            snapshot = Snapshot(store, size_mib)
            gc.collect()
            gc.freeze()  # as the zygote does
            with seal_blob(snapshot.path, snapshot.ref, label="benchmark") as sealed:
                measure_restores(engine, sealed.fd, snapshot, 10)
                restores = measure_restores(engine, sealed.fd, snapshot, num_samples)
            firsts = measure_first_verifications(engine, snapshot, num_first)
            results["sizes"].append(
                {
                    "size_mib": size_mib,
                    "blob_bytes": snapshot.ref.size_bytes,
                    "restore": {name: summarize(values).as_json() for name, values in restores.items()},
                    "first_verification": {name: summarize(values).as_json() for name, values in firsts.items()},
                }
            )
            if size_mib == sizes_mib[0]:
                calls = measure_calls(snapshot, min(num_samples, 200))
                results["calls"] = {name: summarize(values).as_json() for name, values in calls.items()}
    return results


def describe_machine() -> dict[str, Any]:
    """What figures depend on."""
    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": cpus[0].partition(":")[2].strip() if cpus else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release().split("-")[0],
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
    }


def show(results: dict[str, Any]) -> list[str]:
    """The table of figures, in lines of Markdown."""
    lines = [
        "| snapshot | estimate P50 / P95 / P99 | restored, verified before (n) | first verification (n) |",
        "|---|---|---|---|",
    ]
    for row in results["sizes"]:
        size = row["size_mib"]
        total, first = row["restore"]["total"], row["first_verification"]["total"]
        estimate = " / ".join(str(value) for value in ESTIMATES_MS.get(size, ("-", "-", "-")))
        ours, firsts = (
            " / ".join(f"{figures[key] / 1000:.{digits}f}" for key in ("p50_us", "p95_us", "p99_us"))
            for figures, digits in ((total, 3), (first, 1))
        )
        ours, firsts = f"{ours} ms ({total['num_samples']})", f"{firsts} ms ({first['num_samples']})"
        lines.append(f"| {size} MiB | {estimate} ms | {ours} | {firsts} |")
    lines += ["", "| snapshot | phase | P50 | P95 | P99 | max (us) |", "|---|---|---|---|---|---|"]
    for row in results["sizes"]:
        for group in ("restore", "first_verification"):
            for name, figures in row[group].items():
                lines.append(_phase_line(f"{row['size_mib']} MiB", f"{group}: {name}", figures))
    for name, figures in results.get("calls", {}).items():
        lines.append(_phase_line("-", name, figures))
    return lines


def _phase_line(size: str, name: str, figures: dict[str, Any]) -> str:
    values = " | ".join(f"{figures[key]:.2f}" for key in ("p50_us", "p95_us", "p99_us", "max_us"))
    return f"| {size} | {name} | {values} |"


def main(arguments: list[str] | None = None) -> int:
    """Command line; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m worker.benchmarks.guest_restore", description=__doc__)
    parser.add_argument("--full", action="store_true", help="with the largest guest: needs 4 GiB, minutes")
    parser.add_argument("--size", type=int, action="append", metavar="MIB", help="these sizes instead")
    parser.add_argument("--samples", type=int, default=400, help="restores of each size (default: 400)")
    parser.add_argument("--first", type=int, default=200, help="first verifications of each size (default: 200)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures, with histograms")
    options = parser.parse_args(arguments)
    sizes = tuple(options.size) if options.size else FULL_SIZES_MIB if options.full else SIZES_MIB
    with tempfile.TemporaryDirectory() as folder:
        results = measure(sizes, options.samples, options.first, Path(folder))
    print("\n".join(show(results)))
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
