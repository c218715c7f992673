"""The agent's cache of sealed memory: what is shared, what is evicted, what is refused."""

from __future__ import annotations

import asyncio
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from snapshots import chunks
from snapshots.blob_reference import BlobRef
from snapshots.errors import BlobCorrupt, MappingError, SnapshotError
from snapshots.manifest import GUEST_CWASM, GUEST_WASM, WEIGHTS, Manifest, Programs
from tests.snapshot_fixtures import make_card
from worker.sealed_cache import NoRoom, SealedCache


@dataclass
class Sealed:
    fd: int
    size_bytes: int

    def close(self) -> None:
        os.close(self.fd)


class Sealer:
    """Seals nothing: opens a descriptor and counts. ``gate`` holds sealing back while it is clear."""

    def __init__(self) -> None:
        self.sealed: list[str] = []
        self.corrupt: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, path: Path, ref: BlobRef, label: str) -> Sealed:
        assert self.gate.wait(10)
        if ref.digest in self.corrupt:
            raise BlobCorrupt(ref.digest[:8], "its bytes are not the signed ones")
        self.sealed.append(ref.digest)
        return Sealed(os.open(os.devnull, os.O_RDONLY), ref.size_bytes)


class Filling(Sealed):
    """Fills when the test says so: ``end`` is set, with ``error`` if it fails."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__(os.open(os.devnull, os.O_RDONLY), size_bytes)
        self.end = threading.Event()
        self.error: Exception | None = None

    def fill(self) -> None:
        assert self.end.wait(10)
        if self.error is not None:
            raise self.error


def make_ref(text: str, size_bytes: int) -> BlobRef:
    return BlobRef(text.ljust(64, "0"), size_bytes, chunks.DEFAULT_CHUNK_BYTES, b"")


def make_manifest(name: str, *, weights: str = "", size_bytes: int = 100, guest: str = "guest") -> Manifest:
    blobs = {
        WEIGHTS: make_ref(weights or name, size_bytes),
        GUEST_CWASM: make_ref(guest, 10),
        GUEST_WASM: make_ref("wasm", 5),
    }
    return Manifest(name, 0.0, {}, make_card(), blobs, (), (), Programs(b"", b""))


def make_cache(sealer: Sealer, limit_bytes: int = 1000) -> SealedCache:
    return SealedCache(lambda ref: Path("/blobs") / ref.digest, sealer, limit_bytes)


async def test_second_worker_shares_what_the_first_sealed() -> None:
    """One sealing serves every worker of a snapshot, also those that come while it is under way."""
    sealer = Sealer()
    cache = make_cache(sealer)
    sealer.gate.clear()
    waiting = [asyncio.create_task(cache.acquire("a1", make_manifest("a"), f"w{i}")) for i in range(3)]
    await asyncio.sleep(0)
    sealer.gate.set()
    first, *others = await asyncio.gather(*waiting)
    assert others == [first, first]
    assert len(sealer.sealed) == 2
    assert cache.sealed_bytes() == {"a": 110}
    cache.check_integrity()
    cache.close()


async def test_blob_shared_by_two_models_is_held_once_and_kept_for_the_other() -> None:
    """The guest that two models have in common stays when one of them is forgotten."""
    sealer = Sealer()
    cache = make_cache(sealer)
    await cache.acquire("a1", make_manifest("a"), "wa")
    b_fds = await cache.acquire("b1", make_manifest("b"), "wb")
    assert len(sealer.sealed) == 3
    cache.release("wa")
    assert cache.forget("a")
    cache.check_integrity()
    os.fstat(b_fds.guest_fd)
    assert cache.sealed_bytes() == {"b": 110}
    cache.close()
    cache.close()


async def test_least_recently_used_goes_first_and_never_one_in_use() -> None:
    """Room is made by dropping idle snapshots in order of use; a running worker's stays."""
    sealer = Sealer()
    cache = make_cache(sealer, limit_bytes=350)
    for name in ("a", "b", "c"):
        await cache.acquire(f"{name}1", make_manifest(name), f"w{name}")
    cache.release("wb")
    cache.release("wc")
    await cache.acquire("b1", make_manifest("b"), "wb2")
    cache.release("wb2")
    await cache.acquire("d1", make_manifest("d"), "wd")
    assert set(cache.sealed_bytes()) == {"a", "b", "d"}
    cache.check_integrity()
    cache.close()


async def test_what_a_new_snapshot_shares_is_not_dropped_for_it() -> None:
    """Room is made of others first: weights that are here already would only be read and verified again."""
    sealer = Sealer()
    cache = make_cache(sealer, limit_bytes=215)
    for name in ("a", "b"):
        await cache.acquire(f"{name}1", make_manifest(name), f"w{name}")
        cache.release(f"w{name}")
    await cache.acquire("c1", make_manifest("c", weights="a", guest="other"), "wc")
    assert sealer.sealed.count("a".ljust(64, "0")) == 1
    assert set(cache.sealed_bytes()) == {"a", "c"}
    cache.check_integrity()
    cache.close()


async def test_the_limit_holds_where_shared_weights_had_to_go() -> None:
    """What was dropped to make room is counted again where the new snapshot needs it too."""
    cache = make_cache(Sealer(), limit_bytes=115)
    await cache.acquire("a1", make_manifest("a"), "wa")
    cache.release("wa")
    await cache.acquire("b1", make_manifest("b", weights="a", guest="other"), "wb")
    assert cache.sealed_bytes() == {"b": 110}
    with pytest.raises(NoRoom, match="needs 10 bytes of sealed memory; the limit is 115"):
        await cache.acquire("c1", make_manifest("c", weights="a", guest="third"), "wc")
    cache.check_integrity()
    cache.close()


async def test_refuses_what_cannot_fit_and_says_both_numbers() -> None:
    """A snapshot that is larger than the limit, or than what running workers leave, is refused."""
    cache = make_cache(Sealer(), limit_bytes=200)
    with pytest.raises(NoRoom, match="needs 510 bytes of sealed memory; the limit is 200"):
        await cache.acquire("big", make_manifest("big", size_bytes=500), "w")
    await cache.acquire("a1", make_manifest("a"), "wa")
    with pytest.raises(NoRoom, match="running workers hold 110"):
        await cache.acquire("b1", make_manifest("b"), "wb")
    cache.check_integrity()
    cache.close()


async def test_corrupt_blob_leaves_nothing_behind() -> None:
    """When one of two blobs is corrupt, the other is given up too and the next try starts afresh."""
    sealer = Sealer()
    cache = make_cache(sealer)
    manifest = make_manifest("a")
    sealer.corrupt = {manifest.guest_cwasm.digest}
    open_before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(BlobCorrupt):
        await cache.acquire("a1", manifest, "w")
    assert not cache.holds("a1")
    assert len(os.listdir("/proc/self/fd")) == open_before
    sealer.corrupt.clear()
    await cache.acquire("a1", manifest, "w")
    cache.check_integrity()
    cache.close()


async def test_forget_is_refused_while_a_worker_maps_it() -> None:
    """A model in use keeps its sealed bytes until its last worker is gone."""
    cache = make_cache(Sealer())
    await cache.acquire("a1", make_manifest("a"), "w")
    assert not cache.forget("a")
    assert cache.holds("a1")
    cache.release("w")
    cache.release("w")
    assert cache.forget("a")
    assert cache.sealed_bytes() == {}
    cache.close()


async def test_superseded_snapshot_goes_when_its_last_worker_does() -> None:
    """After a rebuild the old snapshot's bytes stay only as long as a worker serves them."""
    cache = make_cache(Sealer())
    await cache.acquire("old", make_manifest("a", weights="old"), "w1")
    await cache.acquire("new", make_manifest("a", weights="new"), "w2")
    cache.retain({"a": "new"})
    assert cache.holds("old")
    cache.release("w1")
    cache.retain({"a": "new"})
    assert not cache.holds("old")
    assert cache.holds("new")
    cache.check_integrity()
    cache.close()


def test_manifest_survives_the_way_to_a_worker() -> None:
    """What an order carries decodes to the same manifest."""
    manifest = make_manifest("a")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(manifest), type=Manifest) == manifest


async def test_policy_always_verifies_held_memory_for_each_later_worker() -> None:
    """The first worker's bytes are verified while they are sealed; each later one's again, both blobs."""
    verified: list[str] = []
    cache = SealedCache(lambda ref: Path("/blobs"), Sealer(), 1000, lambda fd, ref: verified.append(ref.digest[:5]))
    await cache.acquire("a1", make_manifest("a"), "w1")
    assert verified == []
    await cache.acquire("a1", make_manifest("a"), "w2")
    assert verified == ["a0000", "guest"]
    cache.close()


async def test_memory_that_fails_again_is_given_to_nobody() -> None:
    """The worker is refused and no longer counted, so that the memory can be dropped."""

    def refuse(fd: int, ref: BlobRef) -> None:
        raise BlobCorrupt("weights", "its bytes changed in sealed memory")

    cache = SealedCache(lambda ref: Path("/blobs"), Sealer(), 1000, refuse)
    await cache.acquire("a1", make_manifest("a"), "w1")
    cache.release("w1")
    with pytest.raises(BlobCorrupt):
        await cache.acquire("a1", make_manifest("a"), "w2")
    assert cache.forget("a")
    cache.check_integrity()


async def test_a_file_that_no_worker_uses_is_verified_too() -> None:
    """A snapshot is held only if all of its files are the signed ones; files are named by their part, not by path."""
    sealer = Sealer()
    verified: list[str] = []
    is_corrupt = True

    def verify_file(path: Path, ref: BlobRef, label: str) -> None:
        verified.append(label)
        if is_corrupt:
            raise BlobCorrupt(label, "its bytes are not the signed ones")

    cache = SealedCache(lambda ref: Path("/blobs") / ref.digest, sealer, 1000, verify_file=verify_file)
    with pytest.raises(BlobCorrupt, match=GUEST_WASM):
        await cache.acquire("a1", make_manifest("a"), "w1")
    assert not cache.holds("a1")
    cache.check_integrity()
    is_corrupt = False
    await cache.acquire("a1", make_manifest("a"), "w1")
    await cache.acquire("a1", make_manifest("a"), "w2")
    assert verified == [GUEST_WASM] * 2
    cache.close()


async def test_a_dropped_snapshot_is_told_before_its_files_are_closed() -> None:
    """Whoever else maps a snapshot for the cache hears of its end, once."""
    dropped: list[str] = []
    cache = SealedCache(lambda ref: Path("/blobs") / ref.digest, Sealer(), 1000, on_drop=dropped.append)
    await cache.acquire("a1", make_manifest("a"), "w1")
    cache.release("w1")
    assert cache.forget("a")
    assert cache.forget("a")
    assert dropped == ["a1"]
    cache.close()


class FillingHost:
    """A cache that fills weights, and what it did."""

    def __init__(self) -> None:
        self.files: list[Filling] = []
        self.failed: list[tuple[list[str], SnapshotError]] = []
        self.cache = SealedCache(
            lambda ref: Path("/blobs"),
            Sealer(),
            1000,
            begin_fill=self.begin,
            min_fill_bytes=0,
            on_failed=lambda workers, error: self.failed.append((workers, error)),
        )

    def begin(self, path: Path, ref: BlobRef, label: str) -> Filling:
        assert label == WEIGHTS
        self.files.append(Filling(ref.size_bytes))
        return self.files[-1]


async def test_workers_start_while_weights_are_filled() -> None:
    """Two workers of a snapshot get the same descriptors before its weights are whole; nobody may take it away."""
    host = FillingHost()
    first = await host.cache.acquire("a1", make_manifest("a"), "w1")
    assert await host.cache.acquire("a1", make_manifest("a"), "w2") == first
    assert not host.cache.holds("a1")
    host.cache.release("w1")
    host.cache.release("w2")
    assert not host.cache.forget("a")
    host.cache.retain({})
    whole = asyncio.create_task(host.cache.wait_whole("a1"))
    host.files[0].end.set()
    assert await whole
    assert host.cache.holds("a1")
    host.cache.check_integrity()
    assert host.cache.forget("a")
    host.cache.close()


async def test_another_snapshot_waits_for_a_fill() -> None:
    """One at a time; a snapshot over the same weights then has them, and is whole at once."""
    host = FillingHost()
    await host.cache.acquire("a1", make_manifest("a"), "w1")
    other = asyncio.create_task(host.cache.acquire("b1", make_manifest("b", weights="a", guest="other"), "w2"))
    await asyncio.sleep(0)
    assert not other.done()
    host.files[0].end.set()
    await other
    assert len(host.files) == 1
    assert host.cache.holds("b1")
    host.cache.check_integrity()
    host.cache.close()


@pytest.mark.parametrize("error", [BlobCorrupt(WEIGHTS, "its bytes are not the signed ones"), OSError("no disk")])
async def test_a_wrong_chunk_ends_its_workers_and_is_forgotten(error: Exception) -> None:
    """All of its workers are named once; what they map stays open until the last is gone; a next try starts afresh."""
    host = FillingHost()
    open_before = len(os.listdir("/proc/self/fd"))
    await host.cache.acquire("a1", make_manifest("a"), "w1")
    await host.cache.acquire("a1", make_manifest("a"), "w2")
    fds = len(os.listdir("/proc/self/fd"))
    host.files[0].error = error
    host.files[0].end.set()
    if isinstance(error, BlobCorrupt):
        with pytest.raises(BlobCorrupt, match="not the signed ones"):
            await host.cache.wait_whole("a1")
    else:
        assert not await host.cache.wait_whole("a1")
    ((workers, told),) = host.failed
    assert workers == ["w1", "w2"]
    assert type(told) is (BlobCorrupt if isinstance(error, BlobCorrupt) else MappingError)
    assert host.cache.sealed_bytes() == {}
    host.cache.release("w1")
    assert len(os.listdir("/proc/self/fd")) == fds
    host.cache.release("w2")
    assert len(os.listdir("/proc/self/fd")) == open_before
    await host.cache.acquire("a1", make_manifest("a"), "w3")
    host.files[1].end.set()
    assert await host.cache.wait_whole("a1")
    host.cache.check_integrity()
    host.cache.close()


async def test_policy_always_waits_for_a_fill() -> None:
    """The second worker gets memory that was digested again, or an error when there is none any more."""
    for error in (None, BlobCorrupt(WEIGHTS, "its bytes are not the signed ones")):
        file = Filling(100)
        file.error = error
        verified: list[str] = []
        cache = SealedCache(
            lambda ref: Path("/blobs"),
            Sealer(),
            1000,
            lambda fd, ref, verified=verified: verified.append(ref.digest[:5]),  # type: ignore[misc]
            min_fill_bytes=0,
            begin_fill=lambda path, ref, label, file=file: file,  # type: ignore[misc]
        )
        await cache.acquire("a1", make_manifest("a"), "w1")
        second = asyncio.create_task(cache.acquire("a1", make_manifest("a"), "w2"))
        file.end.set()
        if error is None:
            await second
        else:
            with pytest.raises(BlobCorrupt, match="not the signed ones"):
                await second
        assert verified == ([] if error else ["a0000", "guest"])
        cache.close()
