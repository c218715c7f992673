"""Errors of the snapshots package: one base, the cause in the name, the remedy in the message."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Final

_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def describe_disk_error(error: OSError) -> str:
    """What the disk said; where it is full, what to do about that."""
    words = error.strerror or str(error)
    remedy = "; nothing half-written was left: make room (`glowplug gc` deletes what no snapshot names), then try again"
    return words + remedy if error.errno in _NO_ROOM else words


class SnapshotError(Exception):
    """Base of everything that can be wrong with a snapshot, its store or its keys."""


class SnapshotNotFound(SnapshotError):
    """No manifest (or blob) of that name in the store."""


class SignatureInvalid(SnapshotError):
    """The manifest is not signed by a key we trust for this name: bad MAC, unknown or retired key id, other name."""


class ManifestMalformed(SnapshotError):
    """The manifest file cannot be read as one: framing, caps, schema or an inner contradiction."""


class BlobCorrupt(SnapshotError):
    """A blob's bytes are not those that the manifest signed.

    ``chunk`` and ``offset`` (bytes) say where, ``None`` where the whole blob is at fault (missing, wrong size).
    """

    def __init__(self, blob: str, what: str, *, chunk: int | None = None, offset: int | None = None) -> None:
        place = "" if chunk is None else f", chunk {chunk} at byte {offset}"
        super().__init__(f"blob {blob}{place}: {what}; build the snapshot again or restore the file from a good copy")
        self.blob = blob
        self.what = what
        self.chunk = chunk
        self.offset = offset


class Incompatible(SnapshotError):
    """The snapshot was made for another runtime, CPU or format version.

    ``differences`` holds one sentence each.
    """

    def __init__(self, name: str, differences: Sequence[str]) -> None:
        self.name = name
        self.differences = tuple(differences)
        super().__init__(
            f"snapshot {name!r} was built for another environment: {'; '.join(differences)}. "
            f"Rebuild it here: glowplug build SOURCE --name {name}"
        )


class RolledBack(SnapshotError):
    """An authentic manifest that is older than one already seen under its name: somebody put it back."""

    def __init__(self, name: str, created_at_s: float, newest_at_s: float, newest_id: str) -> None:
        super().__init__(
            f"snapshot {name!r} was made at {created_at_s:.3f} s, but a newer one ({newest_id}, {newest_at_s:.3f} s) "
            "was seen here: an old manifest was put back. Build it again; or, to go back on purpose, `glowplug import "
            "FILE --allow-older`"
        )
        self.name = name


class TransportError(SnapshotError):
    """A transport file cannot be read as one: framing, caps, truncated, extended, or frames that lie."""


class KeyRingError(SnapshotError):
    """A key file or key text is missing, malformed or readable by others. Never holds a secret."""


class StoreError(SnapshotError):
    """A store operation was refused: bad name, a path that leaves the store, a size over its cap, a full disk."""


class MappingError(SnapshotError):
    """A file descriptor cannot be sealed or mapped, or a view lies outside of its mapping."""
