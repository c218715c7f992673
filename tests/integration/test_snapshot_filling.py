"""Memory that workers map while it is being filled: nothing is read before it is verified, nobody else can write."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from snapshots import filling, sealing
from snapshots.blob_reference import BlobRef
from snapshots.errors import BlobCorrupt, MappingError, StoreError
from snapshots.filling import FillingBlob, FillingBytes, map_verified
from snapshots.mapping import MFD_NOEXEC_SEAL, map_sealed, seal_blob
from tests.snapshot_fixtures import CHUNK_BYTES, blob_ref, flip_byte

NUM_CHUNKS = 6
SIZE_BYTES = (NUM_CHUNKS - 1) * CHUNK_BYTES + 1000

Blob = tuple[Path, BlobRef, bytes]


@pytest.fixture
def blob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Blob:
    """A file of five chunks and a bit, published chunk by chunk."""
    monkeypatch.setattr(sealing, "PIECE_BYTES", CHUNK_BYTES)
    data = np.random.default_rng(8).bytes(SIZE_BYTES)
    path = tmp_path / "blob"
    path.write_bytes(data)
    return path, blob_ref(data), data


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_reader_follows_the_filler(blob: Blob) -> None:
    """Mapped before a byte is there; each chunk is right as soon as it can be read; sealed and closed at the end."""
    path, ref, data = blob
    before = open_descriptors()
    file = FillingBlob(path, ref, label="weights")
    mapped = map_verified(file.fd, SIZE_BYTES)
    assert isinstance(mapped, FillingBytes)
    assert not mapped.is_whole
    thread = threading.Thread(target=file.fill)
    thread.start()
    for end in range(1, SIZE_BYTES, CHUNK_BYTES // 3):
        mapped.wait_verified(end)
        assert mapped.view(0, end) == data[:end]
    mapped.wait_verified(SIZE_BYTES)
    assert mapped.is_whole
    assert mapped.view() == data
    thread.join()
    mapped.close()
    with map_verified(file.fd, SIZE_BYTES) as whole, map_sealed(file.fd, SIZE_BYTES) as sealed:
        assert not isinstance(whole, FillingBytes)
        assert whole.view() == sealed.view() == data
        whole.wait_verified(SIZE_BYTES)
    file.close()
    file.close()
    assert open_descriptors() == before


def test_a_wrong_chunk_is_never_opened(blob: Blob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks before it can be read; who waits for it, or for one behind it, gets an error; it is never sealed."""
    path, ref, data = blob
    monkeypatch.setattr(filling, "STALL_S", 0.05)
    flip_byte(path, 3 * CHUNK_BYTES + 5)
    before = open_descriptors()
    file = FillingBlob(path, ref, label="weights")
    mapped = map_verified(file.fd, SIZE_BYTES)
    with pytest.raises(BlobCorrupt, match="blob weights, chunk 3 at byte") as caught:
        file.fill()
    assert caught.value.chunk == 3
    mapped.wait_verified(3 * CHUNK_BYTES)
    assert mapped.view(0, 3 * CHUNK_BYTES) == data[: 3 * CHUNK_BYTES]
    for end in (3 * CHUNK_BYTES + 1, SIZE_BYTES):
        with pytest.raises(MappingError, match=f"{3 * CHUNK_BYTES} of {SIZE_BYTES} bytes are verified"):
            mapped.wait_verified(end)
    with pytest.raises(MappingError, match="its bytes could still change"):
        map_sealed(file.fd, SIZE_BYTES)
    mapped.close()
    file.close()
    assert open_descriptors() == before


def test_reading_ahead_of_the_mark_ends_the_process(blob: Blob) -> None:
    """A mistake in a worker cannot compute with bytes that nobody verified: the page is not there for it."""
    path, ref, _ = blob
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sealing, "PIECE_BYTES", SIZE_BYTES)
        file = FillingBlob(path, ref)
        os.set_inheritable(file.fd, True)
        program = (
            "import sys; from snapshots.filling import map_verified; import numpy as np\n"
            "mapped = map_verified(int(sys.argv[1]), int(sys.argv[2]))\n"
            "print(mapped.array(np.uint8, (int(sys.argv[2]),))[int(sys.argv[3])])"
        )
        for position in (0, SIZE_BYTES - 1):
            command = [sys.executable, "-c", program, str(file.fd), str(SIZE_BYTES), str(position)]
            child = subprocess.run(command, pass_fds=(file.fd,), capture_output=True)
            assert (child.returncode, child.stdout) == (-signal.SIGSEGV, b"")
        file.close()


def test_nobody_but_the_filler_can_write_while_it_fills(blob: Blob) -> None:
    """Not through the descriptor, nor through one that is opened anew for writing, nor by mapping or punching holes."""
    path, ref, data = blob
    file = FillingBlob(path, ref)
    writable = os.open(f"/proc/self/fd/{file.fd}", os.O_RDWR)  # what any process of the same user could do
    attempts = [
        lambda: os.pwrite(writable, b"x", 0),
        lambda: os.pwrite(file.fd, b"x", 0),
        lambda: os.ftruncate(writable, 10),
        lambda: os.ftruncate(writable, SIZE_BYTES * 2),
        lambda: mmap.mmap(writable, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE).close(),
    ]
    for attempt in attempts:
        with pytest.raises(OSError, match=r"Operation not permitted|Bad file descriptor"):
            attempt()
    os.close(writable)
    file.fill()
    with map_sealed(file.fd, SIZE_BYTES) as mapped:
        assert mapped.view() == data
    file.close()


def test_closing_ends_a_fill_early(blob: Blob) -> None:
    """The agent stops: the thread that fills ends, although its pace would keep it for an hour."""
    path, ref, _ = blob
    before = open_descriptors()
    file = FillingBlob(path, ref, limit_bytes_per_s=SIZE_BYTES / 3600)
    failures: list[Exception] = []

    def fill() -> None:
        try:
            file.fill()
        except MappingError as error:
            failures.append(error)

    thread = threading.Thread(target=fill)
    thread.start()
    file.close()
    thread.join(10)
    assert len(failures) == 1
    assert open_descriptors() == before


def test_a_file_that_is_never_filled_leaves_nothing(blob: Blob) -> None:
    """Closed before it began: no descriptor stays."""
    path, ref, _ = blob
    before = open_descriptors()
    FillingBlob(path, ref).close()
    assert open_descriptors() == before


def test_an_agent_without_descriptors_loses_none(blob: Blob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no memory file can be made, what was opened for it is closed again: each try costs nothing."""
    path, ref, _ = blob

    def refuse(name: str, flags: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "memfd_create", refuse)
    before = open_descriptors()
    for _ in range(3):
        with pytest.raises(MappingError, match="Too many open files"):
            FillingBlob(path, ref)
    assert open_descriptors() == before


def test_a_kernel_that_knows_no_noexec_seal_may_refuse_too(blob: Blob, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second try, without the flag that is new in Linux 6.3, fails as our own error."""
    path, ref, _ = blob

    def refuse(name: str, flags: int) -> int:
        code = errno.EINVAL if flags & MFD_NOEXEC_SEAL else errno.EMFILE
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(MappingError, match="Too many open files"):
        seal_blob(path, ref)


def test_a_disk_that_fails_is_named_and_not_taken_for_a_lack_of_memory(
    blob: Blob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error has chunk, place and cause; it is no sign of tampering either."""
    path, ref, _ = blob
    read = os.preadv

    def fail(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if offset == 2 * CHUNK_BYTES and not flags:
            buffers.clear()  # else the traceback would hold the mapping
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", fail)
    file = FillingBlob(path, ref, label="weights")
    with pytest.raises(StoreError, match=rf"blob weights, chunk 2 at byte {2 * CHUNK_BYTES}.*Input/output error"):
        file.fill()
    file.close()
    with pytest.raises(StoreError, match=r"chunk 2 .*Input/output error"):
        seal_blob(path, ref, label="weights")


def test_a_slow_fill_tells_of_its_progress_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However low the rate: the mark moves long before its readers would give up, so pieces become smaller with it."""
    data = np.random.default_rng(9).bytes(SIZE_BYTES)
    path = tmp_path / "blob"
    path.write_bytes(data)
    marks: list[int] = []
    monkeypatch.setattr(sealing._Pace, "wait", lambda self, position, stop: None)
    for limit_bytes_per_s in (CHUNK_BYTES // 2, 2.5 * CHUNK_BYTES, 0):
        file = FillingBlob(path, blob_ref(data), limit_bytes_per_s=limit_bytes_per_s)
        file.fill(lambda verified_bytes, _: marks.append(verified_bytes))
        file.close()
    assert marks == [
        *[min(i * CHUNK_BYTES, SIZE_BYTES) for i in range(1, NUM_CHUNKS + 1)],
        *[2 * CHUNK_BYTES, 4 * CHUNK_BYTES, SIZE_BYTES],
        SIZE_BYTES,
    ]


def test_memory_that_anybody_could_write_is_refused() -> None:
    """Without the seals of a filler a mark proves nothing."""
    size_bytes = 10
    fd = os.memfd_create("open", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 2 * mmap.PAGESIZE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    with pytest.raises(MappingError, match="anybody could write to it"):
        map_verified(fd, size_bytes)
    os.close(fd)
