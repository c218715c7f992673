"""Sealed memory on a real kernel: verified, unchangeable, shared between processes."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from snapshots import mapping, sealing
from snapshots.blob_reference import BlobRef
from snapshots.errors import BlobCorrupt, MappingError
from snapshots.mapping import SealedBlob, map_sealed, seal_blob
from snapshots.sealing import HUGE_PAGE_BYTES
from tests.snapshot_fixtures import CHUNK_BYTES, blob_ref, build_snapshot, flip_byte

SIZE_BYTES = 2 * sealing.PIECE_BYTES + 3 * HUGE_PAGE_BYTES + 12_345


@pytest.fixture(scope="module")
def blob(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BlobRef, bytes]:
    """A file of several pieces and a ragged end."""
    data = np.random.default_rng(5).bytes(SIZE_BYTES)
    path = tmp_path_factory.mktemp("blob") / "data"
    path.write_bytes(data)
    return path, blob_ref(data, 1 << 20), data


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, BlobRef, bytes]:
    """A file of four chunks and a half."""
    data = np.random.default_rng(6).bytes(4 * CHUNK_BYTES + 1000)
    path = tmp_path / "small"
    path.write_bytes(data)
    return path, blob_ref(data), data


def open_descriptors() -> int:
    """How many descriptors this process holds."""
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_sealed_memory_holds_the_file(blob: tuple[Path, BlobRef, bytes], num_threads: int) -> None:
    """Every byte, whatever the number of threads; progress ends at the whole."""
    path, ref, data = blob
    progress: list[tuple[int, int]] = []
    with seal_blob(path, ref, num_threads=num_threads, on_progress=lambda *step: progress.append(step)) as sealed:
        assert os.pread(sealed.fd, SIZE_BYTES + 1, 0) == data
        assert progress[-1] == (SIZE_BYTES, SIZE_BYTES)
        with map_sealed(sealed.fd, sealed.size_bytes) as mapped:
            view = mapped.view()
            assert view == data
            del view


@pytest.mark.parametrize("size_bytes", [1, 4095, 4096, CHUNK_BYTES, CHUNK_BYTES + 1, HUGE_PAGE_BYTES])
def test_any_size_can_be_sealed(tmp_path: Path, size_bytes: int) -> None:
    """One byte, page and chunk borders, exactly one huge page."""
    data = np.random.default_rng(size_bytes).bytes(size_bytes)
    (tmp_path / "f").write_bytes(data)
    with seal_blob(tmp_path / "f", blob_ref(data)) as sealed, map_sealed(sealed.fd, size_bytes) as mapped:
        assert bytes(mapped.view()) == data


def test_without_huge_pages_the_bytes_are_the_same(
    blob: tuple[Path, BlobRef, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that knows neither MADV_COLLAPSE nor MFD_NOEXEC_SEAL only costs time."""
    path, ref, data = blob
    monkeypatch.setattr(sealing, "MADV_COLLAPSE", 9999)
    monkeypatch.setattr(mapping, "MFD_NOEXEC_SEAL", 0x4000_0000)
    with seal_blob(path, ref) as sealed:
        assert os.pread(sealed.fd, SIZE_BYTES, 0) == data


def test_sealed_memory_cannot_be_changed_by_anyone(small: tuple[Path, BlobRef, bytes]) -> None:
    """Not written, not mapped writable, not cut, not extended, not punched, not unsealed - also not by reopening it."""
    path, ref, data = small
    with seal_blob(path, ref) as sealed:
        fd = os.open(f"/proc/self/fd/{sealed.fd}", os.O_RDWR)
        try:
            attempts = [
                lambda: os.pwrite(fd, b"x", 0),
                lambda: os.pwrite(fd, b"x", len(data)),
                lambda: os.ftruncate(fd, 0),
                lambda: os.ftruncate(fd, len(data) + 1),
                lambda: mmap.mmap(fd, len(data), mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
                lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
                lambda: _punch_hole(fd),
                lambda: os.pwrite(sealed.fd, b"x", 0),
            ]
            for attempt in attempts:
                with pytest.raises(OSError):  # noqa: PT011 - EPERM or EBADF, both are refusals
                    attempt()
        finally:
            os.close(fd)
        assert os.pread(sealed.fd, len(data) + 1, 0) == data


def _punch_hole(fd: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
    if libc.fallocate(fd, 0x03, 0, 4096):
        raise OSError(ctypes.get_errno(), "fallocate")


def test_sealed_memory_outlives_its_file(small: tuple[Path, BlobRef, bytes]) -> None:
    """Writing to, cutting or deleting the file afterwards changes nothing, and is no SIGBUS."""
    path, ref, data = small
    with seal_blob(path, ref) as sealed, map_sealed(sealed.fd, ref.size_bytes) as mapped:
        path.write_bytes(b"short")
        path.unlink()
        assert bytes(mapped.view()) == data


def test_sealed_memory_can_be_mapped_executable(small: tuple[Path, BlobRef, bytes]) -> None:
    """Compiled guests run from it: the no-exec seal forbids exec(), not an executable mapping."""
    path, ref, data = small
    with seal_blob(path, ref) as sealed:
        fd = os.open(f"/proc/self/fd/{sealed.fd}", os.O_RDONLY)
        code = mmap.mmap(fd, len(data), mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC)
        assert code[:100] == data[:100]
        code.close()
        os.close(fd)


def test_corrupt_chunk_is_named_and_nothing_leaks(blob: tuple[Path, BlobRef, bytes], tmp_path: Path) -> None:
    """The first bad chunk of several, with its place and label; no descriptor and no mapping is left."""
    _, ref, data = blob
    path = tmp_path / "bad"
    path.write_bytes(data)
    flip_byte(path, SIZE_BYTES - 1)
    flip_byte(path, 7 * (1 << 20) + 9)
    before, mapped_before = open_descriptors(), num_sealed_mappings()
    with pytest.raises(BlobCorrupt, match="blob weights, chunk 7 at byte 7340032") as caught:
        seal_blob(path, ref, label="weights", num_threads=1)
    assert (caught.value.blob, caught.value.chunk, caught.value.offset) == ("weights", 7, 7 << 20)
    assert open_descriptors() == before
    assert num_sealed_mappings() == mapped_before  # other tests of this process may hold some


def num_sealed_mappings() -> int:
    """Mappings of sealed memory files in this process."""
    return Path("/proc/self/maps").read_text().count("/memfd:glowplug")


def test_missing_and_resized_files_are_refused(small: tuple[Path, BlobRef, bytes]) -> None:
    """Before any memory is taken."""
    path, ref, data = small
    path.write_bytes(data[:-1])
    with pytest.raises(BlobCorrupt, match=f"{len(data) - 1} bytes, the manifest says {len(data)}"):
        seal_blob(path, ref)
    path.unlink()
    with pytest.raises(BlobCorrupt, match="No such file"):
        seal_blob(path, ref)


def test_file_that_shrinks_while_read_is_refused(
    small: tuple[Path, BlobRef, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut after its size was checked: an error, not a wait and not a signal."""
    path, ref, _ = small

    def open_and_cut(*arguments: object) -> int:
        fd = os.open(path, os.O_RDONLY)
        os.truncate(path, CHUNK_BYTES + 10)
        return fd

    monkeypatch.setattr(mapping, "open_blob_file", open_and_cut)
    with pytest.raises(BlobCorrupt, match="became shorter"):
        seal_blob(path, ref)


def test_views_are_zero_copy_typed_and_read_only(tmp_path: Path) -> None:
    """Tensors of a manifest come as arrays over the mapping, with their dtype and shape."""
    snapshot = build_snapshot(tmp_path)
    ref = snapshot.manifest.weights
    with seal_blob(snapshot.path_of("weights"), ref) as sealed:
        mapped = map_sealed(sealed.fd, sealed.size_bytes)
        for entry, expected in zip(snapshot.manifest.tensors, snapshot.tensors, strict=True):
            array = mapped.tensor(entry)
            assert array.shape == entry.shape
            assert array.tobytes() == expected.tobytes()
            assert array.ctypes.data == mapped.address + entry.offset
            assert not array.flags.writeable
            with pytest.raises(ValueError, match="WRITEABLE"):
                array.flags.writeable = True
            assert (array.dtype == ml_dtypes.bfloat16) == (entry.dtype == "BF16")
            del array
        mapped.close()


def test_close_is_refused_while_a_view_lives(small: tuple[Path, BlobRef, bytes]) -> None:
    """A view can never dangle: closing fails until the last one is gone, and is idempotent after."""
    path, ref, data = small
    with seal_blob(path, ref) as sealed:
        mapped = map_sealed(sealed.fd, ref.size_bytes)
    part = mapped.array("u1", (100,), 10)[5:]
    with pytest.raises(MappingError, match="still in use"):
        mapped.close()
    assert part.tobytes() == data[15:110]
    del part
    mapped.close()
    mapped.close()
    for call in (
        mapped.view,
        mapped.populate,
        mapped.statistics,
        lambda: mapped.array("u1", (1,)),
        lambda: mapped.address,
    ):
        with pytest.raises(MappingError, match="closed"):
            call()


@pytest.mark.parametrize(
    ("dtype", "shape", "offset"),
    [("u1", (1,), -1), ("u1", (2,), 263_143), ("f4", (1 << 62,), 0), ("f4", (1,), 2), ("u1", (-1, -5), 0)],
)
def test_views_outside_or_misaligned_are_refused(
    small: tuple[Path, BlobRef, bytes], dtype: str, shape: tuple[int, ...], offset: int
) -> None:
    """No arithmetic on a manifest's numbers reaches beyond the mapping."""
    path, ref, _ = small
    with (
        seal_blob(path, ref) as sealed,
        map_sealed(sealed.fd, ref.size_bytes) as mapped,
        pytest.raises(MappingError),
    ):
        mapped.array(dtype, shape, offset)


def test_only_fully_sealed_memory_of_the_right_size_is_mapped(small: tuple[Path, BlobRef, bytes]) -> None:
    """A plain file, an unsealed or half-sealed memory file and a wrong size are refused."""
    path, ref, _ = small
    unsealed = os.memfd_create("unsealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 4096)
    plain = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(MappingError, match="could still change"):
            map_sealed(unsealed, 4096)
        fcntl.fcntl(unsealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        with pytest.raises(MappingError, match="could still change"):
            map_sealed(unsealed, 4096)
        with pytest.raises(MappingError, match="not a sealed memory file"):
            map_sealed(plain, ref.size_bytes)
    finally:
        os.close(unsealed)
        os.close(plain)
    with pytest.raises(MappingError):
        map_sealed(-1, 1)
    with seal_blob(path, ref) as sealed:
        with pytest.raises(MappingError, match="expected"):
            map_sealed(sealed.fd, ref.size_bytes + 1)
        with pytest.raises(MappingError, match="expected"):
            map_sealed(sealed.fd, ref.size_bytes - 1)


SHARING_WORKER = """
import sys
from snapshots.mapping import map_sealed
mapped = map_sealed(int(sys.argv[1]), int(sys.argv[2]))
mapped.populate()
total = int(mapped.array("u1", (int(sys.argv[2]),)).sum())
print("ready", total, flush=True)
sys.stdin.readline()
s = mapped.statistics()
print(s.resident_bytes, s.proportional_bytes, s.private_bytes, flush=True)
sys.stdin.readline()
"""


def start_sharing_worker(sealed: SealedBlob) -> subprocess.Popen[str]:
    """A process that inherits the descriptor and maps it."""
    command = [sys.executable, "-c", SHARING_WORKER, str(sealed.fd), str(sealed.size_bytes)]
    return subprocess.Popen(
        command, pass_fds=[sealed.fd], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )


def test_two_processes_share_the_same_memory(blob: tuple[Path, BlobRef, bytes]) -> None:
    """Both see the bytes, neither has a private page, and each is charged half."""
    path, ref, data = blob
    expected = int(np.frombuffer(data, np.uint8).sum())
    with seal_blob(path, ref) as sealed:
        workers = [start_sharing_worker(sealed) for _ in range(2)]
    try:
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == f"ready {expected}\n"
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("\n")
        for worker in workers:
            assert worker.stdout is not None
            resident, proportional, private = map(int, worker.stdout.readline().split())
            assert resident >= SIZE_BYTES // 4096 * 4096
            assert private == 0
            assert abs(proportional - resident / 2) < 64 * 1024
    finally:
        for worker in workers:
            worker.communicate("\n", timeout=30)


def test_populate_makes_every_page_resident(blob: tuple[Path, BlobRef, bytes]) -> None:
    """After it the mapping is resident as a whole, before it (almost) nothing is."""
    path, ref, _ = blob
    with seal_blob(path, ref) as sealed, map_sealed(sealed.fd, ref.size_bytes) as mapped:
        assert mapped.statistics().resident_bytes <= HUGE_PAGE_BYTES
        mapped.populate(5000, 100)
        assert 0 < mapped.statistics().resident_bytes < SIZE_BYTES
        mapped.populate()
        statistics = mapped.statistics()
        assert statistics.resident_bytes >= SIZE_BYTES
        assert statistics.size_bytes == SIZE_BYTES
        assert mapped.address % HUGE_PAGE_BYTES == 0


def test_page_that_cannot_be_had_is_an_error_and_no_signal(
    small: tuple[Path, BlobRef, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a store to the mapping would be a SIGBUS (here: beyond the memory file's end), sealing raises."""
    path, ref, _ = small

    def create_too_short(ref: BlobRef, size_bytes: int) -> int:
        fd = os.memfd_create("short", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, 4096)
        return fd

    monkeypatch.setattr(mapping, "create_memory_file", create_too_short)
    before = open_descriptors()
    with pytest.raises(MappingError, match="Bad address"):
        seal_blob(path, ref)
    assert open_descriptors() == before


def test_memory_file_beyond_a_limit_is_our_error(small: tuple[Path, BlobRef, bytes]) -> None:
    """Where the kernel refuses a memory file of that size, the error says how much was asked for."""
    path, _, data = small
    script = (
        "import sys, resource; from pathlib import Path; from snapshots import chunks, mapping\n"
        "from snapshots.errors import MappingError; from snapshots.blob_reference import BlobRef\n"
        "data = Path(sys.argv[1]).read_bytes(); d = chunks.digest_chunks(data, 65536)\n"
        "ref = BlobRef(chunks.digest_blob(len(data), 65536, d), len(data), 65536, d)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "try: mapping.seal_blob(Path(sys.argv[1]), ref)\n"
        "except MappingError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert f"{len(data)} bytes" in done.stdout
