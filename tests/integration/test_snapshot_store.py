"""The store on a real disk: durable, atomic, shared by several processes."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from snapshots import chunks
from snapshots.errors import SignatureInvalid, SnapshotNotFound, StoreError
from snapshots.keyring import KeyRing
from snapshots.manifest import WEIGHTS
from snapshots.store import SnapshotStore
from tests.eventually import eventually_sync
from tests.snapshot_fixtures import CHUNK_BYTES, blob_ref, build_snapshot, flip_byte, make_key

LONG_AGO_S = 1_000_000_000


def files_below(folder: Path) -> set[str]:
    """Relative paths of all files."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def make_old(path: Path) -> None:
    """Set a file's time far into the past."""
    os.utime(path, (LONG_AGO_S, LONG_AGO_S))


def test_snapshot_reads_back_and_verifies(tmp_path: Path) -> None:
    """What was built is listed, read, and found whole; progress counts every byte."""
    snapshot = build_snapshot(tmp_path)
    progress: list[tuple[int, int]] = []
    assert snapshot.store.list_names() == ["tiny"]
    assert snapshot.store.read_manifest("tiny", snapshot.keyring) == snapshot.manifest
    assert snapshot.store.verify("tiny", snapshot.keyring, lambda *step: progress.append(step)) == []
    total = sum(ref.size_bytes for ref in snapshot.manifest.blobs.values())
    assert progress[-1] == (total, total)
    assert progress == sorted(progress)


def test_blob_does_not_depend_on_how_it_was_written(tmp_path: Path) -> None:
    """Many small writes, odd sizes and one big write give the same reference and bytes."""
    store, data = SnapshotStore(tmp_path), os.urandom(5 * CHUNK_BYTES + 17)
    expected = blob_ref(data)
    for step in (1000, CHUNK_BYTES - 1, CHUNK_BYTES, 3 * CHUNK_BYTES + 5, len(data)):
        with store.add_blob(chunk_bytes=CHUNK_BYTES) as writer:
            for start in range(0, len(data), step):
                writer.write(data[start : start + step])
        assert writer.ref == expected
    assert store.blob_path(expected).read_bytes() == data
    assert files_below(tmp_path / "blobs") == {f"{expected.digest[:2]}/{expected.digest}"}


def test_interrupted_blob_leaves_nothing(tmp_path: Path) -> None:
    """An exception inside the block: no blob, no temporary file, no reference."""
    store = SnapshotStore(tmp_path)
    writer = store.add_blob()

    def build() -> None:
        with writer:
            writer.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build()
    assert files_below(tmp_path) == set()
    with pytest.raises(StoreError, match="not finished"):
        _ = writer.ref


def test_empty_blob_is_refused(tmp_path: Path) -> None:
    """Nothing written is a mistake of the builder."""
    with pytest.raises(StoreError, match="empty"):
        SnapshotStore(tmp_path).add_blob_bytes(b"")
    assert files_below(tmp_path) == set()


def test_full_disk_is_a_clear_error(tmp_path: Path) -> None:
    """The kernel's refusal is passed on as ours, and nothing is left."""
    store = SnapshotStore(tmp_path)
    script = (
        "import resource, sys, signal; from pathlib import Path; from snapshots.store import SnapshotStore\n"
        "from snapshots.errors import StoreError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: SnapshotStore(Path(sys.argv[1])).add_blob_bytes(bytes(200_000))\n"
        "except StoreError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "File too large" in done.stdout
    assert files_below(tmp_path) == set()
    assert store.list_names() == []


def test_killed_builder_leaves_a_file_that_the_next_opening_sweeps(tmp_path: Path) -> None:
    """kill -9 in the middle of a write: the leftover is invisible, and goes when it is old; a living writer's stays."""
    script = (
        "import sys, time; from pathlib import Path; from snapshots.store import SnapshotStore\n"
        "writer = SnapshotStore(Path(sys.argv[1])).add_blob().__enter__(); writer.write(b'half')\n"
        "print('written', flush=True); time.sleep(60)\n"
    )
    builder = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert builder.stdout is not None
        assert builder.stdout.readline() == b"written\n"
        (leftover,) = (tmp_path / "tmp").iterdir()
        make_old(leftover)
        SnapshotStore(tmp_path)
        assert leftover.exists()  # still locked by its writer, however old
    finally:
        builder.kill()
        builder.wait()
    SnapshotStore(tmp_path, tmp_stale_after_s=1e9)
    assert leftover.exists()  # not old enough
    store = SnapshotStore(tmp_path)
    assert not leftover.exists()
    assert store.list_names() == []


def test_manifest_needs_its_blobs(tmp_path: Path) -> None:
    """A manifest whose blob is missing or cut is not published, and the older one of that name stays."""
    snapshot = build_snapshot(tmp_path)
    newer = msgspec.structs.replace(snapshot.manifest, created_at_s=1_800_000_000.0)
    path = snapshot.path_of("guest_wasm")
    data = path.read_bytes()
    path.unlink()
    with pytest.raises(StoreError, match=r"guest_wasm .* not in the store"):
        snapshot.store.write_manifest(newer, snapshot.keyring)
    path.write_bytes(data[:-1])
    with pytest.raises(StoreError, match="regular file of 5000 bytes"):
        snapshot.store.write_manifest(newer, snapshot.keyring)
    assert snapshot.store.read_manifest("tiny", snapshot.keyring) == snapshot.manifest
    assert files_below(tmp_path / "tmp") == set()


def test_replacing_a_snapshot_changes_its_stamp(tmp_path: Path) -> None:
    """A second build under the same name wins, and a watcher of stamps notices."""
    first = build_snapshot(tmp_path)
    before = first.store.list_stamps()
    assert first.store.list_stamps() == before
    second = build_snapshot(tmp_path, seed=8)
    assert second.store.list_stamps() != before
    assert first.store.read_manifest("tiny", first.keyring) == second.manifest


def test_building_again_repairs_a_damaged_blob(tmp_path: Path) -> None:
    """Content addressing does not keep a damaged file because its name is right."""
    snapshot = build_snapshot(tmp_path)
    flip_byte(snapshot.path_of("weights"), 5000)
    assert snapshot.store.verify("tiny", snapshot.keyring) != []
    build_snapshot(tmp_path)
    assert snapshot.store.verify("tiny", snapshot.keyring) == []


def test_verify_lists_every_problem(tmp_path: Path) -> None:
    """Each bad chunk is named with its place, and a missing blob does not hide the others."""
    snapshot = build_snapshot(tmp_path)
    flip_byte(snapshot.path_of("weights"), 0)
    flip_byte(snapshot.path_of("weights"), CHUNK_BYTES + 1)
    snapshot.path_of("guest_wasm").unlink()
    problems = snapshot.store.verify("tiny", snapshot.keyring)
    assert [problem.where for problem in problems] == [
        "guest_wasm",
        "weights, chunk 0 at byte 0",
        f"weights, chunk 1 at byte {CHUNK_BYTES}",
    ]


def test_a_file_system_without_locks_is_told_and_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared folder whose server has no locks: an error of ours, no file and no descriptor left."""
    store = SnapshotStore(tmp_path)

    def refuse(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(StoreError, match="No locks available"):
        store.add_blob_bytes(b"content")
    assert len(os.listdir("/proc/self/fd")) == before
    assert list((tmp_path / "tmp").iterdir()) == []


def test_verify_lists_what_the_disk_cannot_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad sector is one problem more, with its place; what lies behind it is checked all the same."""
    snapshot = build_snapshot(tmp_path)
    flip_byte(snapshot.path_of(WEIGHTS), CHUNK_BYTES + 1)
    bad = snapshot.path_of(WEIGHTS).stat().st_ino
    read = os.pread

    def fail(fd: int, size: int, offset: int) -> bytes:
        if offset == 0 and os.fstat(fd).st_ino == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(fd, size, offset)

    monkeypatch.setattr(os, "pread", fail)
    problems = snapshot.store.verify("tiny", snapshot.keyring)
    assert [problem.where for problem in problems] == [
        "weights, chunk 0 at byte 0",
        f"weights, chunk 1 at byte {CHUNK_BYTES}",
    ]
    assert "Input/output error" in problems[0].what


def test_verify_reports_a_bad_signature_as_a_problem(tmp_path: Path) -> None:
    """With another key there is one finding, the manifest; no blob is looked at."""
    snapshot = build_snapshot(tmp_path)
    (problem,) = snapshot.store.verify("tiny", KeyRing([make_key("other")]))
    assert problem.where == "manifest"
    assert "'test-1'" in problem.what


def test_missing_snapshot_says_how_to_build_it(tmp_path: Path) -> None:
    """Reading, verifying and removing a name that does not exist."""
    snapshot = build_snapshot(tmp_path)
    for call in (snapshot.store.read_manifest, snapshot.store.verify):
        with pytest.raises(SnapshotNotFound, match="glowplug build SOURCE --name none"):
            call("none", snapshot.keyring)
    with pytest.raises(SnapshotNotFound):
        snapshot.store.remove("none")


def test_garbage_goes_only_when_unreferenced_and_old(tmp_path: Path) -> None:
    """Blobs in use stay, young ones stay (a build in progress), the rest goes."""
    snapshot = build_snapshot(tmp_path)
    young, old = (snapshot.store.add_blob_bytes(text) for text in (b"young", b"old"))
    for ref in (*snapshot.manifest.blobs.values(), old):
        make_old(snapshot.store.blob_path(ref))
    report = snapshot.store.collect_garbage(snapshot.keyring)
    assert (report.num_blobs, report.freed_bytes) == (1, 3)
    assert snapshot.store.blob_path(young).exists()
    assert snapshot.store.verify("tiny", snapshot.keyring) == []
    snapshot.store.remove("tiny")
    assert snapshot.store.list_names() == []
    assert snapshot.store.collect_garbage(snapshot.keyring).num_blobs == 3
    assert snapshot.store.collect_garbage(snapshot.keyring, grace_s=-1).num_blobs == 1


def test_garbage_is_kept_while_a_manifest_cannot_be_read(tmp_path: Path) -> None:
    """An unreadable manifest may need any blob, so nothing is deleted and the error names the cause."""
    snapshot = build_snapshot(tmp_path)
    make_old(snapshot.path_of("weights"))
    with pytest.raises(SignatureInvalid):
        snapshot.store.collect_garbage(KeyRing([make_key("other")]))
    assert snapshot.path_of("weights").exists()


def test_publishing_waits_for_a_collection_in_another_process(tmp_path: Path) -> None:
    """A blob cannot be published in the middle of a collection: the writer waits for the lock."""
    store = SnapshotStore(tmp_path)
    script = (
        "import sys; from pathlib import Path; from snapshots.store import SnapshotStore\n"
        "store = SnapshotStore(Path(sys.argv[1]))\n"
        "with store.add_blob() as writer: writer.write(b'x'); print('leaving', flush=True)\n"
    )
    with store._locked(exclusive=True):
        builder = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
        assert builder.stdout is not None
        assert builder.stdout.readline() == b"leaving\n"
        eventually_sync(lambda: _waits_for_lock(builder.pid), what="the writer waits for the lock")
        assert files_below(tmp_path / "blobs") == set()
    assert builder.wait(timeout=60) == 0
    assert len(files_below(tmp_path / "blobs")) == 1


def _waits_for_lock(pid: int) -> bool:
    """Whether the kernel lists the process among those that wait for a lock."""
    waiting = [line.split() for line in Path("/proc/locks").read_text().splitlines() if "->" in line]
    return any(str(pid) in fields for fields in waiting)


def test_two_builders_of_the_same_blob_both_succeed(tmp_path: Path) -> None:
    """The second rename replaces equal bytes by equal bytes."""
    first, second = SnapshotStore(tmp_path), SnapshotStore(tmp_path)
    with first.add_blob() as one, second.add_blob() as other:
        one.write(b"same")
        other.write(b"same")
    assert one.ref == other.ref
    assert first.blob_path(one.ref).read_bytes() == b"same"


def test_blob_files_are_read_only_and_folders_private(tmp_path: Path) -> None:
    """No mode bit invites a change, and other users cannot list the store."""
    snapshot = build_snapshot(tmp_path / "store")
    assert snapshot.path_of("weights").stat().st_mode & 0o777 == 0o444
    assert (tmp_path / "store" / "blobs").stat().st_mode & 0o777 == 0o700


def test_time_of_a_published_blob_is_now(tmp_path: Path) -> None:
    """Also when the same blob was there before: a collection's grace starts anew."""
    store = SnapshotStore(tmp_path)
    ref = store.add_blob_bytes(b"again")
    make_old(store.blob_path(ref))
    assert store.add_blob_bytes(b"again") == ref
    assert store.blob_path(ref).stat().st_mtime > time.time() - 3600
    assert ref.chunk_bytes == chunks.DEFAULT_CHUNK_BYTES
