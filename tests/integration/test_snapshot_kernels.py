"""Compiled kernels in a snapshot: built in, listed, verified, handed to workers, refused when changed."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest
from blake3 import blake3
from click.testing import CliRunner

from scheduler.command import main
from scheduler.contract import environment
from snapshots.errors import BlobCorrupt, MappingError
from snapshots.manifest import KERNELS
from snapshots.mapping import seal_blob
from tests.checkpoint_files import DATA
from tests.model_fixtures import BuiltState, new_state
from worker.backends.cuda.opening import load_kernels
from worker.backends.kernels.manifest import FATBIN_NAME, MANIFEST_NAME, load_manifest, name_in_snapshots
from worker.backends.kernels.sources import KERNELS_FOLDER
from worker.build.errors import BuildError
from worker.build.further_sections import read_further_sections
from worker.build.hf_source import open_hugging_face
from worker.build.kernel_files import MAGICS, read_kernel_file
from worker.build.snapshot_builder import build_snapshot
from worker.kernel_images import read_kernels
from worker.spawn_order import SpawnedFds

FATBIN = MAGICS["fatbin"] + bytes(range(256)) * 40
CUBIN = MAGICS["cubin"] + b"code for one architecture"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kernel files as a CUDA build leaves them."""
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "decoder.fatbin").write_bytes(FATBIN)
    (folder / "decoder.sm_90.cubin").write_bytes(CUBIN)
    return folder


@pytest.fixture(scope="module")
def built(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> BuiltState:
    """The tiny model with both, by the command line."""
    state = new_state(tmp_path_factory.mktemp("built") / "state")
    options = [option for path in sorted(folder.iterdir()) for option in ("--kernels", str(path))]
    arguments = ["build", str(DATA / "tiny_llama"), "--name", "tiny", "--state-dir", str(state.state_dir), *options]
    with pytest.MonkeyPatch.context() as patch:
        for name in (environment.SNAPSHOT_KEYS, environment.SNAPSHOT_KEY, environment.STATE_DIR):
            patch.delenv(name, raising=False)
        result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return state


def seal_all(built: BuiltState, stack: ExitStack) -> SpawnedFds:
    """What a worker gets."""
    fds = []
    for ref in built.manifest("tiny").worker_blobs:
        fds.append(seal_blob(built.store.blob_path(ref), ref).fd)
        stack.callback(os.close, fds[-1])
    return SpawnedFds(*fds)


def test_kernels_are_listed_with_digests_and_reach_the_worker(built: BuiltState) -> None:
    """Each on a page, with the digest of exactly its bytes; a worker's descriptor gives them back, best architecture
    first."""
    manifest = built.manifest("tiny")
    listed = {(kernel.name, kernel.architecture): kernel for kernel in manifest.kernels}
    assert listed["decoder", "fatbin"].digest == blake3(FATBIN).hexdigest()
    assert listed["decoder", "sm_90"].size_bytes == len(CUBIN)
    assert not built.store.verify("tiny", built.keyring)
    with ExitStack() as stack:
        fds = seal_all(built, stack)
        assert len(fds.all) == len(manifest.worker_roles)
        assert read_kernels(manifest, fds, ("sm_90", "fatbin")) == {"decoder": CUBIN}
        assert read_kernels(manifest, fds, ("sm_80", "fatbin")) == {"decoder": FATBIN}
        assert read_kernels(manifest, fds, ("gfx942",)) == {}
        with pytest.raises(MappingError):
            read_kernels(manifest, SpawnedFds(*fds.all[:2]), ("sm_90",))
        wrong = msgspec.structs.replace(manifest.kernels[0], digest="ab" * 32)
        lying = msgspec.structs.replace(manifest, kernels=(wrong,))
        with pytest.raises(BlobCorrupt, match="not the kernel that was signed"):
            read_kernels(lying, fds, (wrong.architecture,))


def test_a_device_that_what_ships_has_no_code_for_takes_the_snapshots(tmp_path: Path) -> None:
    """glowplug's own kernels are named by their sources; only a newer device asks for them, and gets what is signed."""
    folder = tmp_path / "kernels"
    folder.mkdir()
    for name in (FATBIN_NAME, MANIFEST_NAME):
        shutil.copy(KERNELS_FOLDER / name, folder)
    state = new_state(tmp_path / "state")
    with open_hugging_face(DATA / "tiny_llama") as source:
        further = read_further_sections([folder / FATBIN_NAME], None)
        build_snapshot(source, "tiny", state.store, state.keyring, further=further)
    manifest = state.manifest("tiny")
    assert [kernel.name for kernel in manifest.kernels] == [name_in_snapshots(load_manifest())]
    asked: list[tuple[str, ...]] = []
    with ExitStack() as stack:
        fds = seal_all(state, stack)

        def read(architectures: tuple[str, ...]) -> dict[str, bytes]:
            asked.append(architectures)
            return read_kernels(manifest, fds, architectures)

        assert load_kernels(90, read) == load_kernels(130, read)  # here the same file, by two ways
        assert asked == [("sm_130", "fatbin")]
        assert load_kernels(130, lambda _architectures: {"glowplug-of-others": b"code"})[:4] == MAGICS["fatbin"]
    (folder / FATBIN_NAME).write_bytes(MAGICS["fatbin"] + b"changed")
    with pytest.raises(BuildError, match="its manifest says"):
        read_kernel_file(folder / FATBIN_NAME)


def test_a_snapshot_without_kernels_has_none(tmp_path: Path) -> None:
    """Neither section nor blob nor descriptor."""
    state = new_state(tmp_path / "state")
    with open_hugging_face(DATA / "tiny_llama") as source:
        build_snapshot(source, "plain", state.store, state.keyring)
    manifest = state.manifest("plain")
    assert KERNELS not in manifest.blobs
    assert read_kernels(manifest, SpawnedFds(0, 0), ("sm_90",)) == {}


def test_a_changed_kernel_is_refused_by_verify(built: BuiltState, tmp_path: Path) -> None:
    """One bit of its code: the blob's chunk does not match, and nothing is sealed."""
    ref = built.manifest("tiny").blobs[KERNELS]
    data = bytearray(built.store.blob_path(ref).read_bytes())
    data[7] ^= 4
    changed = tmp_path / "blob"
    changed.write_bytes(data)
    with pytest.raises(BlobCorrupt, match="chunk 0"):
        seal_blob(changed, ref)


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("decoder.ptx", b"//", "expected NAME.fatbin"),
        ("decoder.fatbin", b"\x7fELF", "begins with"),
        ("decoder.sm_90.cubin", FATBIN, "begins with"),
        ("decoder.cubin", CUBIN, "says its architecture"),
        ("empty.fatbin", b"", "begins with"),
    ],
)
def test_files_that_are_no_kernels_are_refused(tmp_path: Path, name: str, data: bytes, reason: str) -> None:
    """By name and by first bytes, before anything is built."""
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BuildError, match=reason):
        read_kernel_file(tmp_path / name)


def test_inspect_lists_kernels_and_primed_prefixes(built: BuiltState) -> None:
    """Names, architectures, sizes; prefixes with tokens and bytes, and their text only when asked for."""
    (built.state_dir / "prompt").write_text("Once upon a midnight dreary")
    runner = CliRunner()
    place = ("--state-dir", str(built.state_dir))
    prompt = str(built.state_dir / "prompt")
    made = runner.invoke(main, ["build", "--weights-of", "tiny", "--name", "primed", "--prime-text", prompt, *place])
    assert made.exit_code == 0, made.output
    kernels = json.loads(runner.invoke(main, ["inspect", "tiny", "--json", *place]).stdout)["kernels"]
    assert {(kernel["architecture"], kernel["size_bytes"]) for kernel in kernels} == {
        ("fatbin", len(FATBIN)),
        ("sm_90", len(CUBIN)),
    }
    assert "sm_90" in runner.invoke(main, ["inspect", "tiny", *place]).stdout
    plain = runner.invoke(main, ["inspect", "primed", *place]).stdout
    assert "primed prefixes" in plain
    assert "midnight" not in plain
    shown = runner.invoke(main, ["inspect", "primed", "--prefix-text", *place])
    assert "midnight" in shown.stdout, shown.output
    (prefix,) = json.loads(runner.invoke(main, ["inspect", "primed", "--json", *place]).stdout)["prefixes"]
    assert prefix.keys() == {"tokens", "size_bytes", "computed_with"}
    assert prefix["tokens"] > 4
