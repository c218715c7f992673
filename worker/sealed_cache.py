"""The agent's sealed, verified memory files: what makes a wake start from host RAM (T2) instead of disk (T1).

Blobs are held once, however many snapshots name them. A snapshot stays while it is the present one of its model and
fits the limit; the least recently used that no worker maps goes first. Sealed bytes are immutable, so they need no
second verification, and giving one up never disturbs a worker: the kernel keeps the pages until the last map goes.

=========== ============================================ ======================================================
a snapshot  from ... on                                  its workers
=========== ============================================ ======================================================
filling     guest, prefixes and unmapped files verified  may start, and wait for each weight (snapshots.filling)
whole       every chunk of the weights verified          wait for nothing
failed      a chunk is not the signed one                are named to ``on_failed``, which ends them
=========== ============================================ ======================================================
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

import structlog

from snapshots.blob_reference import BlobRef
from snapshots.errors import BlobCorrupt, MappingError, SnapshotError
from snapshots.manifest import Manifest
from worker.spawn_order import SpawnedFds


class SealedFile(Protocol):
    """A sealed memory file; whoever holds it closes it."""

    @property
    def fd(self) -> int: ...

    @property
    def size_bytes(self) -> int: ...

    def close(self) -> None:
        """Close ``fd``. Idempotent."""


class FillingFile(SealedFile, Protocol):
    """A memory file that workers may map already; sealed when :meth:`fill` returns."""

    def fill(self) -> None:
        """Copy in and verify, until :meth:`close` stops it. Runs in a thread; raises SnapshotError."""


#: Begins the same for a blob of which workers can use the first chunks before the last is there.
BeginFill = Callable[[Path, BlobRef, str], FillingFile]
#: Hears of workers (by id) that map a snapshot of which a chunk turned out wrong.
OnFailed = Callable[[list[str], SnapshotError], None]
#: Copies a blob file into sealed memory while verifying every chunk; the string names the blob in errors. Runs in a
#: thread; raises SnapshotError.
SealBlob = Callable[[Path, BlobRef, str], SealedFile]
#: Verifies every chunk of a blob file that is not held, named in errors. Runs in a thread; raises SnapshotError.
VerifyFile = Callable[[Path, BlobRef, str], None]
#: Digests what a sealed descriptor holds once more. Runs in a thread; raises SnapshotError.
VerifySealed = Callable[[int, BlobRef], None]


#: Weights smaller than this are verified before a worker is forked: in the few milliseconds nothing else could be done.
MIN_FILL_BYTES: Final = 32 * 1024 * 1024


class NoRoom(Exception):
    """A snapshot is larger than the memory that sealed files may take; the message has both numbers."""


@dataclass(slots=True)
class _Held:
    """A snapshot in the cache. ``workers`` are those that map it now; written only by acquire and release."""

    model: str
    digests: tuple[str, ...]
    workers: set[str] = field(default_factory=set)
    filling: asyncio.Task[None] | None = None  # until whole
    refused: SnapshotError | None = None  # why it will never be; it is out of the books then

    @property
    def is_in_use(self) -> bool:
        return bool(self.workers) or self.filling is not None


class SealedCache:
    """Sealed blobs by digest, snapshots in order of use. Event loop only; sealing itself runs in a thread."""

    def __init__(
        self,
        blob_path: Callable[[BlobRef], Path],
        seal_blob: SealBlob,
        limit_bytes: int,
        verify_again: VerifySealed | None = None,
        on_drop: Callable[[str], None] = lambda snapshot_id: None,
        verify_file: VerifyFile = lambda path, ref, label: None,
        begin_fill: BeginFill | None = None,
        on_failed: OnFailed = lambda workers, error: None,
        min_fill_bytes: int = MIN_FILL_BYTES,
    ) -> None:
        """``verify_again`` is the policy "always": it is called for every worker that starts from held memory.
        ``on_drop`` hears of every snapshot that is given up. ``verify_file`` is called, when a snapshot is sealed, for
        those of its files that no worker maps: a snapshot is served whole and unchanged, or not at all. With
        ``begin_fill`` workers may start while weights of at least ``min_fill_bytes`` are being verified; ``on_failed``
        hears of those that must end because a chunk is wrong."""
        self._blob_path = blob_path
        self._seal_blob = seal_blob
        self._verify_again = verify_again
        self._on_drop = on_drop
        self._verify_file = verify_file
        self._begin_fill = begin_fill
        self._on_failed = on_failed
        self._min_fill_bytes = min_fill_bytes
        self._failed: list[tuple[set[str], list[SealedFile]]] = []  # workers that must still end, and what they map
        self._limit_bytes = limit_bytes
        self._blobs: dict[str, SealedFile] = {}
        self._snapshots: OrderedDict[str, _Held] = OrderedDict()  # by snapshot id, least recently used first
        self._log = structlog.get_logger()
        self._filling: asyncio.Task[None] | None = None  # the latest, until it ends
        self._sealing = asyncio.Lock()  # one at a time: each uses every core, and waits for the same snapshot end well

    def holds(self, snapshot_id: str) -> bool:
        """Whether every byte of it is verified, so that :meth:`acquire` would return at once."""
        held = self._snapshots.get(snapshot_id)
        return held is not None and held.filling is None

    async def wait_whole(self, snapshot_id: str) -> bool:
        """Wait until a snapshot is no longer being filled; whether it is held then.

        Raises:
            BlobCorrupt: a chunk was not the signed one.
        """
        held = self._snapshots.get(snapshot_id)
        if held is not None and held.filling is not None:
            await asyncio.wait({held.filling})
            if isinstance(held.refused, BlobCorrupt):
                raise held.refused
        return self.holds(snapshot_id)

    async def acquire(self, snapshot_id: str, manifest: Manifest, worker_id: str) -> SpawnedFds:
        """Descriptors of what a worker maps of a snapshot, held until :meth:`release` of ``worker_id``; the cache owns
        them. Seals what it does not have, in a thread; of weights that are being filled the descriptor comes early.

        Raises:
            SnapshotError: a blob is missing or corrupt, or cannot be read; nothing of it is kept.
            NoRoom: it cannot fit.
        """
        is_fresh = snapshot_id not in self._snapshots
        if is_fresh:
            async with self._sealing:
                if self._filling is not None and snapshot_id not in self._snapshots:
                    await asyncio.wait({self._filling})  # it uses every core as well, and may fill what this one shares
                if snapshot_id not in self._snapshots:
                    await self._seal(snapshot_id, manifest)
        self._snapshots[snapshot_id].workers.add(worker_id)
        self._snapshots.move_to_end(snapshot_id)
        if self._verify_again is not None and not is_fresh:
            if not await self.wait_whole(snapshot_id):
                raise MappingError(f"the weights of {manifest.name!r} were refused while this worker waited for them")
            await self._verify(manifest, worker_id, self._verify_again)
        return SpawnedFds(*(self._blobs[ref.digest].fd for ref in manifest.worker_blobs))

    def release(self, worker_id: str) -> None:
        """A worker is gone. Idempotent."""
        for held in self._snapshots.values():
            held.workers.discard(worker_id)
        for workers, files in list(self._failed):
            workers.discard(worker_id)
            if not workers:
                self._failed.remove((workers, files))
                _close_all(files)

    def forget(self, model: str) -> bool:
        """Drop what is held for ``model``; False if a worker still maps some of it, which stays then."""
        own = [(snapshot_id, held) for snapshot_id, held in self._snapshots.items() if held.model == model]
        for snapshot_id, held in own:
            if not held.is_in_use:
                self._drop(snapshot_id)
        return not any(held.is_in_use for _, held in own)

    def retain(self, snapshot_ids: Mapping[str, str]) -> None:
        """Drop snapshots that are not the present one of their model (``snapshot_ids``: model -> id), unless in use."""
        for snapshot_id, held in list(self._snapshots.items()):
            if snapshot_ids.get(held.model) != snapshot_id and not held.is_in_use:
                self._drop(snapshot_id)

    def sealed_bytes(self) -> dict[str, int]:
        """Bytes held for each model. A blob that two models share counts for both."""
        totals: dict[str, int] = {}
        for held in self._snapshots.values():
            totals[held.model] = totals.get(held.model, 0) + sum(self._blobs[d].size_bytes for d in held.digests)
        return totals

    def check_integrity(self) -> None:
        """Every held blob belongs to a snapshot and the other way round.

        Raises:
            AssertionError: the books are wrong.
        """
        named = {digest for held in self._snapshots.values() for digest in held.digests}
        if named != set(self._blobs):
            raise AssertionError(f"sealed blobs {sorted(self._blobs)} but snapshots name {sorted(named)}")

    def close(self) -> None:
        """Close every descriptor; workers keep their maps. Idempotent."""
        self._snapshots.clear()
        for sealed in self._blobs.values():
            sealed.close()
        self._blobs.clear()
        for _, files in self._failed:
            _close_all(files)
        self._failed.clear()

    async def _seal(self, snapshot_id: str, manifest: Manifest) -> None:
        """Guest code first of all, whole; then whatever else a worker needs whole; weights go on being filled."""
        refs = {ref.digest: ref for ref in manifest.worker_blobs}
        labels = {ref.digest: role for role, ref in manifest.blobs.items()}
        self._make_room(refs, manifest.name)
        loop = asyncio.get_running_loop()
        fresh: dict[str, SealedFile] = {}
        filling: FillingFile | None = None
        try:
            for role, ref in manifest.blobs.items():
                if ref.digest not in refs:
                    await loop.run_in_executor(None, self._verify_file, self._blob_path(ref), ref, role)
            # Looked up again after each wait: a shared blob may have been dropped with another snapshot meanwhile.
            while missing := [digest for digest in reversed(refs) if digest not in {*self._blobs, *fresh}]:
                ref = refs[missing[0]]
                arguments = (self._blob_path(ref), ref, labels[ref.digest])
                is_early = ref.digest == manifest.weights.digest and ref.size_bytes >= self._min_fill_bytes
                if is_early and self._begin_fill is not None:
                    filling = await loop.run_in_executor(None, self._begin_fill, *arguments)
                    fresh[ref.digest] = filling
                else:
                    fresh[ref.digest] = await loop.run_in_executor(None, self._seal_blob, *arguments)
        except BaseException:
            for sealed in fresh.values():
                sealed.close()
            raise
        self._blobs.update(fresh)
        held = self._snapshots[snapshot_id] = _Held(manifest.name, tuple(refs))
        if filling is not None:
            held.filling = self._filling = loop.create_task(self._fill(snapshot_id, filling), name="fill")

    async def _fill(self, snapshot_id: str, file: FillingFile) -> None:
        """Never raises: what goes wrong ends the snapshot's workers."""
        begin_s = time.monotonic()
        try:
            await asyncio.get_running_loop().run_in_executor(None, file.fill)
            elapsed_ms = round((time.monotonic() - begin_s) * 1000, 2)
            self._log.info("weights_verified", snapshot_id=snapshot_id, bytes=file.size_bytes, elapsed_ms=elapsed_ms)
        except SnapshotError as error:
            self._fail(snapshot_id, error)
        except Exception as error:  # whatever it is, workers that wait for these bytes must hear of it
            self._fail(snapshot_id, MappingError(f"weights could not be read: {type(error).__name__}: {error}"))
        finally:
            self._filling = None
            if held := self._snapshots.get(snapshot_id):
                held.filling = None

    def _fail(self, snapshot_id: str, error: SnapshotError) -> None:
        """Take a snapshot out of the books. What its workers map is closed when the last of them is gone: a
        descriptor's number must not be another file's while one of them is being forked."""
        held = self._snapshots.pop(snapshot_id, None)
        if held is None:
            return  # closed
        held.refused = error
        self._log.error("weights_refused", snapshot_id=snapshot_id, model=held.model, error=str(error))
        needed = {digest for other in self._snapshots.values() for digest in other.digests}
        files = [self._blobs.pop(digest) for digest in held.digests if digest not in needed]
        if held.workers:
            self._failed.append((set(held.workers), files))
            self._on_failed(sorted(held.workers), error)
        else:
            _close_all(files)

    async def _verify(self, manifest: Manifest, worker_id: str, verify_again: VerifySealed) -> None:
        """Verify held memory; the worker is counted already, so that nobody closes the descriptors meanwhile."""
        loop = asyncio.get_running_loop()
        try:
            for ref in manifest.worker_blobs:
                await loop.run_in_executor(None, verify_again, self._blobs[ref.digest].fd, ref)
        except BaseException:
            self.release(worker_id)
            raise

    def _make_room(self, refs: Mapping[str, BlobRef], model: str) -> None:
        """For ``refs``, by digest. Snapshots that share some of them go last: what is here need not be read again."""
        snapshots = sorted(self._snapshots.items(), key=lambda item: not refs.keys().isdisjoint(item[1].digests))
        for snapshot_id, held in snapshots:
            if self._total_bytes() + self._count_missing_bytes(refs) <= self._limit_bytes:
                return
            if not held.is_in_use:
                self._drop(snapshot_id)
        total_bytes, needed_bytes = self._total_bytes(), self._count_missing_bytes(refs)
        if total_bytes + needed_bytes > self._limit_bytes:
            raise NoRoom(
                f"model {model!r} needs {needed_bytes} bytes of sealed memory; the limit is {self._limit_bytes}, of "
                f"which running workers hold {total_bytes}. Raise GLOWPLUG_SEALED_LIMIT_BYTES or stop a model"
            )

    def _count_missing_bytes(self, refs: Mapping[str, BlobRef]) -> int:
        return sum(ref.size_bytes for digest, ref in refs.items() if digest not in self._blobs)

    def _total_bytes(self) -> int:
        return sum(sealed.size_bytes for sealed in self._blobs.values())

    def _drop(self, snapshot_id: str) -> None:
        gone = self._snapshots.pop(snapshot_id)
        self._on_drop(snapshot_id)
        needed = {digest for held in self._snapshots.values() for digest in held.digests}
        for digest in gone.digests:
            if digest not in needed:
                self._blobs.pop(digest).close()


def _close_all(files: list[SealedFile]) -> None:
    for file in files:
        file.close()
