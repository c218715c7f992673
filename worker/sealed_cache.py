"""The agent's sealed, verified memory files: what makes a wake start from host RAM (T2) instead of disk (T1).

Blobs are held once, however many snapshots name them. A snapshot stays while it is the present one of its model and
fits the limit; the least recently used that no worker maps goes first. Sealed bytes are immutable, so they need no
second verification, and giving one up never disturbs a worker: the kernel keeps the pages until the last map goes.
"""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from snapshots.manifest import BlobRef, Manifest
from worker.spawn_order import SpawnedFds


class SealedFile(Protocol):
    """A sealed memory file; whoever holds it closes ``fd``."""

    @property
    def fd(self) -> int: ...

    @property
    def size_bytes(self) -> int: ...


#: Copies a blob file into sealed memory while verifying every chunk; the string names the blob in errors. Runs in a
#: thread; raises SnapshotError.
SealBlob = Callable[[Path, BlobRef, str], SealedFile]
#: Verifies every chunk of a blob file that is not held, named in errors. Runs in a thread; raises SnapshotError.
VerifyFile = Callable[[Path, BlobRef, str], None]
#: Digests what a sealed descriptor holds once more. Runs in a thread; raises SnapshotError.
VerifySealed = Callable[[int, BlobRef], None]


class NoRoom(Exception):
    """A snapshot is larger than the memory that sealed files may take; the message has both numbers."""


@dataclass(slots=True)
class _Held:
    """A snapshot in the cache. ``workers`` are those that map it now; written only by acquire and release."""

    model: str
    digests: tuple[str, ...]
    workers: set[str] = field(default_factory=set)


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
    ) -> None:
        """``verify_again`` is the policy "always": it is called for every worker that starts from held memory.
        ``on_drop`` hears of every snapshot that is given up. ``verify_file`` is called, when a snapshot is sealed, for
        those of its files that no worker maps: a snapshot is served whole and unchanged, or not at all."""
        self._blob_path = blob_path
        self._seal_blob = seal_blob
        self._verify_again = verify_again
        self._on_drop = on_drop
        self._verify_file = verify_file
        self._limit_bytes = limit_bytes
        self._blobs: dict[str, SealedFile] = {}
        self._snapshots: OrderedDict[str, _Held] = OrderedDict()  # by snapshot id, least recently used first
        self._sealing = asyncio.Lock()  # one at a time: each uses every core, and waits for the same snapshot end well

    def holds(self, snapshot_id: str) -> bool:
        """Whether :meth:`acquire` would return at once."""
        return snapshot_id in self._snapshots

    async def acquire(self, snapshot_id: str, manifest: Manifest, worker_id: str) -> SpawnedFds:
        """Descriptors of what a worker maps of a snapshot, held until :meth:`release` of ``worker_id``; the cache owns
        them. Seals what it does not have, in a thread.

        Raises:
            SnapshotError: a blob is missing or corrupt; nothing of it is kept.
            NoRoom: it cannot fit.
        """
        is_fresh = snapshot_id not in self._snapshots
        if is_fresh:
            async with self._sealing:
                if snapshot_id not in self._snapshots:
                    await self._seal(snapshot_id, manifest)
        self._snapshots[snapshot_id].workers.add(worker_id)
        self._snapshots.move_to_end(snapshot_id)
        if self._verify_again is not None and not is_fresh:
            await self._verify(manifest, worker_id, self._verify_again)
        return SpawnedFds(*(self._blobs[ref.digest].fd for ref in manifest.worker_blobs))

    def release(self, worker_id: str) -> None:
        """A worker is gone. Idempotent."""
        for held in self._snapshots.values():
            held.workers.discard(worker_id)

    def forget(self, model: str) -> bool:
        """Drop what is held for ``model``; False if a worker still maps some of it, which stays then."""
        own = [(snapshot_id, held) for snapshot_id, held in self._snapshots.items() if held.model == model]
        for snapshot_id, held in own:
            if not held.workers:
                self._drop(snapshot_id)
        return not any(held.workers for _, held in own)

    def retain(self, snapshot_ids: Mapping[str, str]) -> None:
        """Drop snapshots that are not the present one of their model (``snapshot_ids``: model -> id), unless in use."""
        for snapshot_id, held in list(self._snapshots.items()):
            if snapshot_ids.get(held.model) != snapshot_id and not held.workers:
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
            os.close(sealed.fd)
        self._blobs.clear()

    async def _seal(self, snapshot_id: str, manifest: Manifest) -> None:
        refs = {ref.digest: ref for ref in manifest.worker_blobs}
        labels = {ref.digest: role for role, ref in manifest.blobs.items()}
        self._make_room(sum(ref.size_bytes for digest, ref in refs.items() if digest not in self._blobs), manifest.name)
        loop = asyncio.get_running_loop()
        fresh: dict[str, SealedFile] = {}
        try:
            for role, ref in manifest.blobs.items():
                if ref.digest not in refs:
                    await loop.run_in_executor(None, self._verify_file, self._blob_path(ref), ref, role)
            # Looked up again after each wait: a shared blob may have been dropped with another snapshot meanwhile.
            while missing := refs.keys() - self._blobs.keys() - fresh.keys():
                ref = refs[missing.pop()]
                arguments = (self._blob_path(ref), ref, labels[ref.digest])
                fresh[ref.digest] = await loop.run_in_executor(None, self._seal_blob, *arguments)
        except BaseException:
            for sealed in fresh.values():
                os.close(sealed.fd)
            raise
        self._blobs.update(fresh)
        self._snapshots[snapshot_id] = _Held(manifest.name, tuple(refs))

    async def _verify(self, manifest: Manifest, worker_id: str, verify_again: VerifySealed) -> None:
        """Verify held memory; the worker is counted already, so that nobody closes the descriptors meanwhile."""
        loop = asyncio.get_running_loop()
        try:
            for ref in manifest.worker_blobs:
                await loop.run_in_executor(None, verify_again, self._blobs[ref.digest].fd, ref)
        except BaseException:
            self.release(worker_id)
            raise

    def _make_room(self, needed_bytes: int, model: str) -> None:
        for snapshot_id, held in list(self._snapshots.items()):
            if self._total_bytes() + needed_bytes <= self._limit_bytes:
                return
            if not held.workers:
                self._drop(snapshot_id)
        total_bytes = self._total_bytes()
        if total_bytes + needed_bytes > self._limit_bytes:
            raise NoRoom(
                f"model {model!r} needs {needed_bytes} bytes of sealed memory; the limit is {self._limit_bytes}, of "
                f"which running workers hold {total_bytes}. Raise GLOWPLUG_SEALED_LIMIT_BYTES or stop a model"
            )

    def _total_bytes(self) -> int:
        return sum(sealed.size_bytes for sealed in self._blobs.values())

    def _drop(self, snapshot_id: str) -> None:
        gone = self._snapshots.pop(snapshot_id)
        self._on_drop(snapshot_id)
        needed = {digest for held in self._snapshots.values() for digest in held.digests}
        for digest in gone.digests:
            if digest not in needed:
                os.close(self._blobs.pop(digest).fd)
