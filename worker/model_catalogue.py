"""Which snapshots this node has, verified, and the model cards it publishes for them.

A snapshot whose manifest does not verify stays in the catalogue with a *refused* card: requests for it are answered
with that error, and no worker is ever started. It is read again when one of its files changes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import msgspec

from scheduler.contract import codec
from scheduler.contract.errors import ErrorCode, ErrorInfo
from scheduler.contract.messages import ModelCard
from scheduler.contract.states import Task
from snapshots.errors import (
    BlobCorrupt,
    Incompatible,
    KeyRingError,
    ManifestMalformed,
    RolledBack,
    SignatureInvalid,
    SnapshotError,
    SnapshotNotFound,
)
from snapshots.keyring import KeyRing
from snapshots.manifest import Manifest, verify_identity
from snapshots.store import ManifestStamp, SnapshotStore

#: Kinds of security events, by error; what is not here is a mistake of operation, not a sign of tampering.
SECURITY_KINDS: Final[dict[type[SnapshotError], str]] = {
    SignatureInvalid: "signature_invalid",
    ManifestMalformed: "manifest_malformed",
    BlobCorrupt: "blob_corrupt",
    RolledBack: "rolled_back",
}

_CODES: Final[dict[type[SnapshotError], ErrorCode]] = {
    SignatureInvalid: ErrorCode.SNAPSHOT_SIGNATURE_INVALID,
    RolledBack: ErrorCode.SNAPSHOT_SIGNATURE_INVALID,
    Incompatible: ErrorCode.SNAPSHOT_INCOMPATIBLE,
    KeyRingError: ErrorCode.SNAPSHOT_INCOMPATIBLE,  # no key for an encrypted blob on this node
    SnapshotNotFound: ErrorCode.MODEL_NOT_FOUND,
}


@dataclass(frozen=True, slots=True)
class SecurityEvent:
    """Something that looks like tampering."""

    kind: str
    model: str
    reason: str


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """A snapshot as last read. ``manifest`` is None when the card is refused for its manifest.

    ``encoded_manifest`` is what a worker gets, as MessagePack.
    """

    card: ModelCard
    stamp: ManifestStamp
    manifest: Manifest | None = None
    encoded_manifest: bytes = b""
    blob_stamps: tuple[tuple[int, int, int], ...] = ()


@dataclass(slots=True)
class CatalogueChange:
    """What a scan found."""

    changed: list[ModelCard]
    removed: list[str]
    security_events: list[SecurityEvent]

    def __bool__(self) -> bool:
        return bool(self.changed or self.removed)


class ModelCatalogue:
    """The node's snapshots by name. One thread at a time; methods block on the disk (a scan without news: 20 us a
    snapshot).
    """

    def __init__(self, store: SnapshotStore, keyring: KeyRing, identity: Mapping[str, str]) -> None:
        """``identity`` is that of the guest runtime here (``guests.compile.guest_identity``)."""
        self._store = store
        self._keyring = keyring
        self._identity = identity
        self._entries: dict[str, CatalogueEntry] = {}

    @property
    def cards(self) -> list[ModelCard]:
        """Cards of all snapshots, refused ones included."""
        return [entry.card for entry in self._entries.values()]

    @property
    def snapshot_ids(self) -> dict[str, str]:
        """Present snapshot id of every model that is not refused."""
        return {name: entry.card.snapshot_id for name, entry in self._entries.items() if entry.card.refused is None}

    def scan(self) -> CatalogueChange:
        """Read whatever changed on disk since the last scan."""
        change = CatalogueChange([], [], [])
        stamps = self._store.list_stamps()
        for name in [name for name in self._entries if name not in stamps]:
            del self._entries[name]
            change.removed.append(name)
        for name, stamp in stamps.items():
            entry = self._entries.get(name)
            if entry is not None and entry.stamp == stamp and not self._may_be_repaired(entry):
                continue
            fresh, event = self._read(name, stamp)
            self._entries[name] = fresh
            if event is not None:
                change.security_events.append(event)
            if entry is None or entry.card != fresh.card:
                change.changed.append(fresh.card)
        return change

    def get(self, name: str) -> CatalogueEntry | None:
        """The entry of a snapshot, as of the last scan."""
        return self._entries.get(name)

    def refuse(self, entry: CatalogueEntry, error: SnapshotError) -> tuple[ModelCard, SecurityEvent | None]:
        """Mark a snapshot whose blobs turned out wrong; its refused card, and the event if it looks like tampering."""
        name = entry.card.name
        card = msgspec.structs.replace(entry.card, refused=describe_refusal(error))
        blob_stamps = self._stamp_blobs(entry.manifest)
        self._entries[name] = CatalogueEntry(card, entry.stamp, entry.manifest, blob_stamps=blob_stamps)
        return card, _security_event(name, error)

    def _may_be_repaired(self, entry: CatalogueEntry) -> bool:
        """Whether a snapshot that was refused for its blobs has other blob files now."""
        if entry.card.refused is None or entry.manifest is None:
            return False
        return self._stamp_blobs(entry.manifest) != entry.blob_stamps

    def _read(self, name: str, stamp: ManifestStamp) -> tuple[CatalogueEntry, SecurityEvent | None]:
        try:
            manifest = self._store.read_manifest(name, self._keyring)
            verify_identity(manifest, self._identity)
        except SnapshotError as error:
            return CatalogueEntry(ModelCard(name, refused=describe_refusal(error)), stamp), _security_event(name, error)
        return CatalogueEntry(make_card(manifest), stamp, manifest, codec.encode(manifest)), None

    def _stamp_blobs(self, manifest: Manifest | None) -> tuple[tuple[int, int, int], ...]:
        stamps = []
        for ref in manifest.blobs.values() if manifest is not None else ():
            try:
                status = os.lstat(self._store.blob_path(ref))
                stamps.append((status.st_ino, status.st_ctime_ns, status.st_size))
            except OSError:
                stamps.append((0, 0, 0))
        return tuple(stamps)


def make_card(manifest: Manifest) -> ModelCard:
    """The card of a verified manifest."""
    card = manifest.card
    return ModelCard(
        name=manifest.name,
        snapshot_id=manifest.snapshot_id,
        created_at_s=manifest.created_at_s,
        architecture=card.architecture,
        weight_format=card.weight_format,
        context_length=card.context_length,
        vocab_size=card.vocab_size,
        max_token_bytes=card.max_token_bytes,
        chat_template=card.chat_template,
        bos_token=card.bos_token,
        eos_token=card.eos_token,
        weights_bytes=manifest.weights.size_bytes,
        worker_bytes=card.worker_bytes,
        task=Task.EMBED if manifest.vector_size else Task.GENERATE,
        vector_size=manifest.vector_size,
    )


def describe_refusal(error: SnapshotError) -> ErrorInfo:
    """The error that requests for a refused snapshot get."""
    return ErrorInfo(_CODES.get(type(error), ErrorCode.SNAPSHOT_CORRUPT), str(error))


def _security_event(name: str, error: SnapshotError) -> SecurityEvent | None:
    kind = SECURITY_KINDS.get(type(error))
    return SecurityEvent(kind, name, str(error)) if kind is not None else None
