"""fs-verity digests in software, and what is made of the kernel's."""

from __future__ import annotations

import errno
import hashlib
import os
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshots import fs_verity
from snapshots.blob_reference import BlobRef
from snapshots.fs_verity import VerityHasher, compare_verity, enable_verity, examine_verity, measure_verity
from tests.snapshot_fixtures import build_snapshot


def plain_verity(data: bytes) -> str:
    """The algorithm as the kernel's documentation words it, without any streaming."""

    def hash_level(level: bytes) -> bytes:
        blocks = [level[start : start + 4096].ljust(4096, b"\0") for start in range(0, len(level), 4096)]
        return b"".join(hashlib.sha256(block).digest() for block in blocks)

    root = hash_level(data) if data else bytes(32)
    while len(root) > 32:
        root = hash_level(root)
    descriptor = struct.pack("<BBBBIQ", 1, 1, 12, 0, 0, len(data)) + root.ljust(64, b"\0") + bytes(32 + 144)
    assert len(descriptor) == 256
    return hashlib.sha256(descriptor).hexdigest()


def stream(data: bytes, step: int) -> str:
    """Digest in steps."""
    hasher = VerityHasher()
    for start in range(0, len(data), step):
        hasher.update(memoryview(data)[start : start + step])
    return hasher.hexdigest()


def test_empty_file_has_the_published_digest() -> None:
    """The digest that fsverity-utils prints for an empty file."""
    assert VerityHasher().hexdigest() == "3d248ca542a24fc62d1c43b916eae5016878e2533c88238480b26128a1f1af95"


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 20_000), step=st.integers(1, 9000), seed=st.integers(0, 255))
def test_streaming_equals_the_definition(size: int, step: int, seed: int) -> None:
    """Whatever the sizes of the pieces."""
    data = bytes((seed + index * 7) % 256 for index in range(size))
    assert stream(data, step) == plain_verity(data)


def test_tree_of_three_levels() -> None:
    """More than 128 leaves, and more than one block of them."""
    data = bytes(4096 * 129 + 5)
    assert stream(data, 1 << 20) == plain_verity(data)


def test_written_blob_has_the_digest_of_its_file(tmp_path: Path) -> None:
    """Computed while writing, of what lies on disk."""
    snapshot = build_snapshot(tmp_path, with_verity=True)
    for role, ref in snapshot.manifest.blobs.items():
        assert ref.verity_sha256 == plain_verity(snapshot.path_of(role).read_bytes())
    assert snapshot.store.verify("tiny", snapshot.keyring) == []


def test_this_filesystem_is_probed_without_an_error(tmp_path: Path) -> None:
    """Offered or not, the answer is one of the states; a missing file is one too."""
    snapshot = build_snapshot(tmp_path, with_verity=True)
    ref, path = snapshot.manifest.weights, snapshot.path_of("weights")
    is_on = enable_verity(path)
    finding = examine_verity(path, ref)
    assert finding.state == "matches" if is_on else finding.state in ("not offered here", "off")
    assert examine_verity(path.with_name("gone"), ref).state == "no file"


def test_measured_digest_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a kernel that answers: equal, different, not enabled, nothing to compare with; a difference is a problem."""
    snapshot = build_snapshot(tmp_path, with_verity=True)
    ref, path = snapshot.manifest.weights, snapshot.path_of("weights")
    assert ref.verity_sha256 is not None
    answer = bytes.fromhex(ref.verity_sha256)

    def ioctl(fd: int, request: int, argument: bytes) -> bytes:
        assert request == fs_verity.FS_IOC_MEASURE_VERITY
        return struct.pack("<HH64s", 1, len(answer), answer)

    monkeypatch.setattr(fs_verity.fcntl, "ioctl", ioctl)
    assert examine_verity(path, ref).state == "matches"
    answer = bytes(32)
    assert examine_verity(path, ref).state == "differs"
    problems = snapshot.store.verify("tiny", snapshot.keyring)
    assert [problem.where for problem in problems] == ["guest_cwasm", "guest_wasm", "weights"]
    assert "fs-verity digest is sha256:0000" in problems[0].what

    plain = BlobRef(ref.digest, ref.size_bytes, ref.chunk_bytes, ref.chunk_digests)
    assert compare_verity("00" * 32, plain).state == "on"
    assert compare_verity(None, ref).state == "off"


@pytest.mark.parametrize("code", [errno.ENOTTY, errno.EOPNOTSUPP])
def test_kernel_without_it_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Said in words, never raised."""
    snapshot = build_snapshot(tmp_path, with_verity=True)

    def ioctl(fd: int, request: int, argument: bytes) -> bytes:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fs_verity.fcntl, "ioctl", ioctl)
    assert not enable_verity(snapshot.path_of("weights"))
    finding = examine_verity(snapshot.path_of("weights"), snapshot.manifest.weights)
    assert (finding.state, finding.detail) == ("not offered here", f"{os.strerror(code)} (FS_IOC_MEASURE_VERITY)")


def test_file_without_verity_measures_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENODATA is an answer."""

    def ioctl(fd: int, request: int, argument: bytes) -> bytes:
        raise OSError(errno.ENODATA, "No data available")

    monkeypatch.setattr(fs_verity.fcntl, "ioctl", ioctl)
    assert measure_verity(0) is None
