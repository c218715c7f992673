"""A snapshot that is restored a thousand times in one process leaves it as it was."""

from __future__ import annotations

import fcntl
import gc
import os
from pathlib import Path
from typing import NamedTuple

from guest_fixtures import bytes_guest, compiled, sealed, wat_guest

from guests.errors import GuestTrap
from guests.initialise import initialise_guest
from guests.runtime import GuestEngine
from guests.text import GuestText
from tests.eventually import eventually_sync

RESTORES = 1_000
MEBIBYTE = 1 << 20
# 24 MiB of baked memory: more than Wasmtime maps without asking how dense it is.
LARGE = wat_guest(
    init="(drop (memory.grow (i32.const 384))) (memory.fill (i32.const 65536) (i32.const 7) (i32.const 25165824))",
    query="(i64.load (i32.const 20000000))",
)


class Usage(NamedTuple):
    """Of this process."""

    num_descriptors: int
    num_mappings: int
    num_threads: int
    resident_bytes: int
    virtual_bytes: int


def usage() -> Usage:
    """Now."""
    gc.collect()
    pages = [int(field) for field in Path("/proc/self/statm").read_text().split()]
    return Usage(
        len(os.listdir("/proc/self/fd")),
        len(Path("/proc/self/maps").read_text().splitlines()),
        len(os.listdir("/proc/self/task")),
        pages[1] * os.sysconf("SC_PAGE_SIZE"),
        pages[0] * os.sysconf("SC_PAGE_SIZE"),
    )


def report(what: str, before: Usage, after: Usage) -> None:
    """Print the figures (pytest -s shows them) and hold them against their bounds."""
    print(f"\n{what}, {RESTORES} times:")
    for name, old, new in zip(Usage._fields, before, after, strict=True):
        print(f"  {name:16s} {old:>14d} before, {new:>14d} after")
    assert after.num_descriptors == before.num_descriptors
    # A thread that has been joined, here or in an earlier test, is in the kernel's list for a moment longer.
    eventually_sync(lambda: len(os.listdir("/proc/self/task")) <= before.num_threads, what="no thread more")
    assert after.num_mappings <= before.num_mappings + 8  # the allocator's own arenas may come and go
    assert after.resident_bytes <= before.resident_bytes + 16 * MEBIBYTE
    assert after.virtual_bytes <= before.virtual_bytes + 1024 * MEBIBYTE  # one lost instance alone would be 4 GiB


def test_a_thousand_restores_leak_nothing() -> None:
    """Load, instantiate, resume, call, close, from a fresh descriptor each time."""
    baked = initialise_guest(LARGE, {}, []).baked_wasm
    with sealed(compiled(baked)) as path, GuestEngine() as engine:
        number = int(path.rpartition("/")[2])

        def restore() -> None:
            duplicate = fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 0)
            module = engine.load(f"/proc/self/fd/{duplicate}")
            os.close(duplicate)
            with module.instantiate() as instance:
                assert instance.call("gp_resume", 1) == 0
                assert instance.call("gp_token_bytes", 0) == 0x0707070707070707
            module.close()

        for _ in range(50):
            restore()
        before = usage()
        for _ in range(RESTORES):
            restore()
        report("restore of a 24 MiB guest", before, usage())


def test_a_thousand_traps_leak_nothing() -> None:
    """Traps, with sequences open on the instance that is lost, and the restore that follows each."""
    with sealed(compiled(bytes_guest().baked_wasm)) as path, GuestEngine() as engine:
        module = engine.load(path)
        text = GuestText(module, 1)

        def trap() -> None:
            text.open_sequence(("stop",)).push(65)
            try:
                text.tokenize("trap!", add_special=False, parse_special=False)
            except GuestTrap:
                return
            raise AssertionError("no trap")

        for _ in range(50):
            trap()
        before = usage()
        for _ in range(RESTORES):
            trap()
        report("trap and restore", before, usage())
        assert engine.linker.memories == {}
        text.close()
        module.close()


def test_a_thousand_engines_leak_nothing() -> None:
    """An engine with its linker, host functions and ticker, made and closed."""

    def make() -> None:
        with GuestEngine() as engine:
            engine.start_ticker()

    for _ in range(20):
        make()
    before = usage()
    for _ in range(RESTORES // 10):
        make()
    report("engine (a tenth as often)", before, usage())
