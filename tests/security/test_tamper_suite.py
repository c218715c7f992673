"""At least 2,000 seeded attacks on built snapshots, each through what a node agent does before it starts a worker.

The attacker can read, change, add, swap, cut and delete any file of the store, and has no signing key that counts.
After each attack the agent's catalogue scans, and what it would serve is sealed. The attack is *refused* if the card is
refused or sealing fails with our own error; *harmless* if manifest and sealed bytes are exactly those that were built.
Anything else fails the suite: another exception, other bytes, another manifest.
"""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import pytest

from snapshots.blob_reference import BlobRef
from snapshots.errors import SnapshotError
from snapshots.key_file import Key
from snapshots.keyring import KeyRing
from snapshots.manifest import GUEST_CWASM, WEIGHTS, Manifest, seal_manifest
from snapshots.mapping import seal_blob
from snapshots.rollback import NewestSeen
from snapshots.store import SnapshotStore
from snapshots.transport import export_snapshot, import_snapshot
from snapshots.verification import verify_blob
from tests.snapshot_fixtures import (
    CHUNK_BYTES,
    IDENTITY,
    SyntheticSnapshot,
    build_snapshot,
    make_encryption_key,
    make_key,
)
from worker.model_catalogue import ModelCatalogue

SEED: Final = 20260301
#: What a worker gets: the blobs that the agent seals.
SERVED_ROLES: Final = (WEIGHTS, GUEST_CWASM)
PLAIN, OTHER, ENCRYPTED = "tiny", "other", "secret"
REVOKED_KEY: Final = make_key("revoked", 0x11)


@dataclass
class Host:
    """A store with three snapshots, as an agent sees it; ``plain`` holds what each must restore to."""

    store: SnapshotStore
    keyring: KeyRing
    snapshots: dict[str, SyntheticSnapshot]
    plain: dict[tuple[str, str], bytes]
    transport_files: dict[str, Path]
    outside: Path

    def files(self, name: str) -> list[Path]:
        """Manifest and blobs of one snapshot."""
        snapshot = self.snapshots[name]
        return [snapshot.manifest_path, *(snapshot.path_of(role) for role in sorted(snapshot.manifest.blobs))]

    def wake(self, name: str) -> str:
        """What the agent does for a first request: ``refused`` or ``harmless``; fails on anything else."""
        catalogue = ModelCatalogue(self.store, self.keyring, IDENTITY)
        catalogue.scan()
        entry = catalogue.get(name)
        if entry is None or entry.card.refused is not None:
            return "refused"
        assert entry.manifest == self.snapshots[name].manifest, "another manifest was accepted"
        try:
            for role, ref in entry.manifest.blobs.items():
                self._take(name, role, ref)
        except SnapshotError as error:
            card, _ = catalogue.refuse(entry, error)
            assert card.refused is not None
            return "refused"
        return "harmless"

    def _take(self, name: str, role: str, ref: BlobRef) -> None:
        """Seal what a worker maps, and check on disk what it does not."""
        path = self.store.blob_path(ref)
        if role not in SERVED_ROLES:
            verify_blob(path, ref, role, keyring=self.keyring, num_threads=1)
            return
        with seal_blob(path, ref, keyring=self.keyring, num_threads=1) as sealed:
            data = os.pread(sealed.fd, sealed.size_bytes + 1, 0)
        assert data == self.plain[name, role], "other bytes were sealed"


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Built once; each attack undoes itself, and at the end everything must be whole again."""
    root = tmp_path_factory.mktemp("tamper")
    revoked = Key(REVOKED_KEY.key_id, b"", REVOKED_KEY.created, "revoked")
    keyring = KeyRing([revoked, make_key(), make_encryption_key()])
    newest = NewestSeen(root / "keys" / "snapshot.newest")
    snapshots = {
        name: build_snapshot(root / "store", name, seed=seed, keyring=keyring, encrypt=name == ENCRYPTED, newest=newest)
        for name, seed in ((PLAIN, 7), (OTHER, 8), (ENCRYPTED, 7))
    }
    store = snapshots[PLAIN].store
    plain = {
        (name, role): snapshots[PLAIN if name == ENCRYPTED else name].path_of(role).read_bytes()
        for name in snapshots
        for role in SERVED_ROLES
    }
    exports = {"transport file": (PLAIN, root / "file"), "encrypted transport file": (ENCRYPTED, root / "encrypted")}
    for name, path in exports.values():
        export_snapshot(store, name, keyring, path)
    (root / "outside").mkdir()
    built = Host(
        store, keyring, snapshots, plain, {attack: path for attack, (_, path) in exports.items()}, root / "outside"
    )
    assert [built.wake(name) for name in snapshots] == ["harmless"] * 3
    yield built
    assert [built.wake(name) for name in snapshots] == ["harmless"] * 3


@pytest.fixture(scope="module")
def tally(request: pytest.FixtureRequest) -> Iterator[Counter[tuple[str, str]]]:
    """Outcomes by kind of attack; printed when the module ends."""
    counts: Counter[tuple[str, str]] = Counter()
    yield counts
    lines = [""]
    for attack in ATTACKS:
        refused, harmless = counts[attack, "refused"], counts[attack, "harmless"]
        lines.append(f"  {attack:34} {refused + harmless:5} attacks: {refused:5} refused {harmless:4} harmless")
    lines.append(f"  {'all':34} {counts.total():5} attacks, none served, none crashed (seed {SEED})")
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("\n".join(lines))


@contextmanager
def content(path: Path, data: bytes) -> Iterator[None]:
    """Other bytes in place of a file; put back afterwards."""
    before = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(before)


@contextmanager
def moved_away(path: Path, host: Host) -> Iterator[Path]:
    """The file somewhere else; its old place is the attacker's."""
    away = host.outside / "original"
    path.rename(away)
    try:
        yield away
    finally:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        away.rename(path)


def flipped(data: bytes, chance: random.Random, num_bits: int = 1) -> bytes:
    """Some bits changed, at least one."""
    changed = bytearray(data)
    for _ in range(num_bits):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed) if changed != data else flipped(data, chance)


def flip_bit(host: Host, chance: random.Random, name: str, place: int) -> Iterator[str]:
    path = host.files(name)[place]
    with content(path, flipped(path.read_bytes(), chance)):
        yield name


def flip_manifest(host: Host, chance: random.Random) -> Iterator[str]:
    """One bit of a manifest."""
    yield from flip_bit(host, chance, chance.choice((PLAIN, ENCRYPTED)), 0)


def flip_plain_blob(host: Host, chance: random.Random) -> Iterator[str]:
    """One bit of a plain blob."""
    yield from flip_bit(host, chance, PLAIN, chance.choice((1, 2, 3)))


def flip_encrypted_blob(host: Host, chance: random.Random) -> Iterator[str]:
    """One bit of ciphertext or tag."""
    yield from flip_bit(host, chance, ENCRYPTED, chance.choice((1, 3)))


def overwrite_region(host: Host, chance: random.Random) -> Iterator[str]:
    """A run of random, zero or foreign bytes."""
    name = chance.choice((PLAIN, ENCRYPTED))
    path = chance.choice(host.files(name))
    data = path.read_bytes()
    start = chance.randrange(len(data))
    size = min(chance.choice((4, 16, 256, 4096)), len(data) - start)
    foreign = host.files(OTHER)[1].read_bytes()
    fill = chance.choice((chance.randbytes(size), bytes(size), foreign[:size]))
    with content(path, data[:start] + fill + data[start + len(fill) :]):
        yield name


def truncate(host: Host, chance: random.Random) -> Iterator[str]:
    """Any shorter length, also at a chunk's border and zero."""
    name = chance.choice((PLAIN, ENCRYPTED))
    path = chance.choice(host.files(name))
    data = path.read_bytes()
    with content(path, data[: chance.choice((0, 1, len(data) - 1, CHUNK_BYTES, chance.randrange(len(data))))]):
        yield name


def extend(host: Host, chance: random.Random) -> Iterator[str]:
    """Bytes behind the end, or before the start."""
    name = chance.choice((PLAIN, ENCRYPTED))
    path = chance.choice(host.files(name))
    data, extra = path.read_bytes(), chance.choice((b"\0", bytes(16), chance.randbytes(chance.randrange(1, 5000))))
    with content(path, chance.choice((data + extra, extra + data))):
        yield name


def swap_chunks(host: Host, chance: random.Random) -> Iterator[str]:
    """Two chunks exchange their places, within a blob or between two; a chunk of an older or other writing."""
    name = chance.choice((PLAIN, ENCRYPTED))
    step = CHUNK_BYTES + (16 if name == ENCRYPTED else 0)
    first = host.files(name)[3]
    second = chance.choice((first, host.files(name)[1], host.files(OTHER)[3]))
    data, source = bytearray(first.read_bytes()), second.read_bytes()
    into = chance.randrange(len(data) // step) * step
    start = chance.randrange(max(1, len(source) // step)) * step
    taken, given = source[start : start + step], bytes(data[into : into + step])
    data[into : into + step] = taken.ljust(step, b"\0")
    if second == first:
        data[start : start + step] = given
    with content(first, bytes(data)):
        yield name


def swap_files(host: Host, chance: random.Random) -> Iterator[str]:
    """One file of the store in the place of another, whole and intact."""
    name = chance.choice((PLAIN, ENCRYPTED))
    every = [path for owner in host.snapshots for path in host.files(owner)]
    target = chance.choice(host.files(name))
    source = chance.choice([path for path in every if path != target])
    with content(target, source.read_bytes()):
        yield name


def replay_old_manifest(host: Host, chance: random.Random) -> Iterator[str]:
    """A manifest that was once signed for this name with a key that still counts, and is older."""
    snapshot = host.snapshots[PLAIN]
    older = msgspec.structs.replace(
        chance.choice((snapshot, host.snapshots[OTHER])).manifest,
        name=PLAIN,
        created_at_s=snapshot.manifest.created_at_s - chance.choice((0.001, 1.0, chance.uniform(0.01, 1e8))),
    )
    with content(snapshot.manifest_path, seal_manifest(older, host.keyring)):
        yield PLAIN


def forged(host: Host, chance: random.Random, name: str) -> Manifest:
    """A manifest that an attacker would like to see served."""
    manifest, other = host.snapshots[name].manifest, host.snapshots[OTHER].manifest
    return chance.choice(
        (
            manifest,
            msgspec.structs.replace(manifest, created_at_s=manifest.created_at_s + chance.uniform(1, 1e6)),
            msgspec.structs.replace(manifest, blobs={**manifest.blobs, GUEST_CWASM: other.guest_cwasm}),
            msgspec.structs.replace(manifest, tensor_handles=tuple(reversed(manifest.tensor_handles))),
            msgspec.structs.replace(other, name=name),
        )
    )


def sign_with_wrong_key(host: Host, chance: random.Random) -> Iterator[str]:
    """A stranger's key, under its own id, under ours, under the encryption key's, or with its secret."""
    name = chance.choice((PLAIN, ENCRYPTED))
    secret = chance.randrange(256)
    key = chance.choice(
        (make_key("stranger", secret), make_key("test-1", secret ^ 0x5A or 1), make_key("e-test", 0xC3))
    )
    if key.key_id == "test-1" and key.secret == make_key().secret:
        key = make_key("test-1", 1)
    with content(host.files(name)[0], seal_manifest(forged(host, chance, name), KeyRing([key]))):
        yield name


def sign_with_revoked_key(host: Host, chance: random.Random) -> Iterator[str]:
    """A key that did count once; the attacker has it."""
    name = chance.choice((PLAIN, ENCRYPTED))
    with content(host.files(name)[0], seal_manifest(forged(host, chance, name), KeyRing([REVOKED_KEY]))):
        yield name


def replace_by_something_else(host: Host, chance: random.Random) -> Iterator[str]:
    """A symlink (to the very file, a device, nothing), FIFO, folder, hard link, empty file, or nothing at all."""
    name = chance.choice((PLAIN, ENCRYPTED))
    path = chance.choice(host.files(name))
    with moved_away(path, host) as away:
        kind = chance.choice(("symlink", "device", "dangling", "loop", "fifo", "folder", "hard link", "empty", "gone"))
        targets = {"symlink": away, "device": Path("/dev/zero"), "dangling": away / "none", "loop": path}
        if kind in targets:
            path.symlink_to(targets[kind])
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "hard link":
            path.hardlink_to(away)
        elif kind == "empty":
            path.touch()
        yield name


def redirect_folder(host: Host, chance: random.Random) -> Iterator[str]:
    """A blob's folder becomes a symlink to a folder of the attacker, with a changed or the right file in it."""
    name = chance.choice((PLAIN, ENCRYPTED))
    path = chance.choice(host.files(name)[1:])
    data = path.read_bytes()
    folder = path.parent
    with moved_away(folder, host):
        evil = host.outside / "folder"
        evil.mkdir()
        (evil / path.name).write_bytes(chance.choice((data, flipped(data, chance))))
        folder.symlink_to(evil)
        try:
            yield name
        finally:
            shutil.rmtree(evil)


def strange_names(host: Host, chance: random.Random) -> Iterator[str]:
    """A valid manifest under other names, also such that are paths, flags or hidden."""
    text = chance.choice(("..", "-rf", "a b", ".tiny", "x" * 200, "t\u0131ny", "tiny\n", "evil", "tiny.gpsnap", "TINY"))
    path = host.files(PLAIN)[0].with_name(f"{text}.gpsnap")
    shutil.copy(host.files(PLAIN)[0], path)
    try:
        listed = ModelCatalogue(host.store, host.keyring, IDENTITY)
        listed.scan()
        assert {card.name for card in listed.cards if card.refused is None} == set(host.snapshots)
        yield text
    finally:
        path.unlink()


def change_after_verification(host: Host, chance: random.Random) -> Iterator[str]:
    """The file is changed, cut or removed while its sealed memory is held; then a new wake is tried."""
    name = chance.choice((PLAIN, ENCRYPTED))
    role = chance.choice(SERVED_ROLES)
    ref = host.snapshots[name].manifest.blobs[role]
    path = host.store.blob_path(ref)
    data = path.read_bytes()
    changed = chance.choice((flipped(data, chance), data[: len(data) // 2], b"", bytes(len(data))))
    with seal_blob(path, ref, keyring=host.keyring, num_threads=1) as sealed, content(path, changed):
        assert os.pread(sealed.fd, sealed.size_bytes + 1, 0) == host.plain[name, role]
        yield name


ATTACKS: Final[dict[str, tuple[int, Callable[[Host, random.Random], Iterator[str]]]]] = {
    "bit flipped, manifest": (500, flip_manifest),
    "bit flipped, blob": (400, flip_plain_blob),
    "bit flipped, encrypted blob": (200, flip_encrypted_blob),
    "region overwritten": (200, overwrite_region),
    "truncated": (150, truncate),
    "extended": (150, extend),
    "chunks swapped": (150, swap_chunks),
    "files swapped": (100, swap_files),
    "old manifest replayed": (60, replay_old_manifest),
    "signed with a wrong key": (80, sign_with_wrong_key),
    "signed with a revoked key": (60, sign_with_revoked_key),
    "something else in a file's place": (150, replace_by_something_else),
    "folder redirected": (60, redirect_folder),
    "strange names": (40, strange_names),
    "changed after verification": (100, change_after_verification),
    "transport file": (300, lambda host, chance: iter(())),
    "encrypted transport file": (300, lambda host, chance: iter(())),
}
#: The snapshot behind the attacks that go through an import.
IMPORTED: Final = {"transport file": PLAIN, "encrypted transport file": ENCRYPTED}


def test_there_are_at_least_2000_attacks() -> None:
    """What the requirement asks for."""
    assert sum(num_attacks for num_attacks, _ in ATTACKS.values()) >= 2000


@pytest.mark.parametrize("attack", [name for name in ATTACKS if name not in IMPORTED])
def test_threat_changed_snapshot(host: Host, tally: Counter[tuple[str, str]], attack: str) -> None:
    """None is served, none ends in anything but our own errors."""
    num_attacks, perform = ATTACKS[attack]
    chance = random.Random(f"{SEED} {attack}")
    attempt = contextmanager(perform)
    for number in range(num_attacks):
        with attempt(host, chance) as name:
            try:
                tally[attack, host.wake(name)] += 1
            except BaseException as error:
                error.add_note(f"attack {number} of {attack!r} on {name!r}, seed {SEED}")
                raise


@pytest.mark.parametrize("attack", IMPORTED)
def test_threat_hostile_transport_file(
    host: Host, tally: Counter[tuple[str, str]], tmp_path: Path, attack: str
) -> None:
    """Flips, cuts, extensions and exchanged parts of an exported file: the store stays empty, or whole and equal."""
    name = IMPORTED[attack]
    chance = random.Random(f"{SEED} {attack}")
    original = host.transport_files[attack].read_bytes()
    store = SnapshotStore(tmp_path / "there")
    changed = tmp_path / "changed"
    for number in range(ATTACKS[attack][0]):
        data = bytearray(original)
        kind = chance.randrange(5)
        if kind <= 1:  # half of the flips in the framing at the start and the end, where there is little of it
            span = chance.choice((len(data), 24))
            position = chance.choice((chance.randrange(span), len(data) - 1 - chance.randrange(min(span, 80))))
            data[position] ^= 1 << chance.randrange(8)
        elif kind == 2:
            del data[chance.randrange(len(data)) :]
        elif kind == 3:
            data += chance.randbytes(chance.randrange(1, 3000))
        else:
            size = chance.choice((8, 512, CHUNK_BYTES))
            one, two = (chance.randrange(len(data) - size) for _ in range(2))
            data[one : one + size] = original[two : two + size]
        changed.write_bytes(data)
        try:
            manifest, _ = import_snapshot(store, changed, host.keyring, num_threads=1)
        except SnapshotError:
            assert store.list_names() == [], f"attack {number} left something"
            assert not list((tmp_path / "there" / "tmp").iterdir())
            tally[attack, "refused"] += 1
        else:
            assert manifest == host.snapshots[name].manifest
            assert store.verify(name, host.keyring) == []
            store.remove(name)
            tally[attack, "harmless"] += 1
