"""Several snapshots over one weights blob: on disk, in the agent's sealed memory, and in what they answer."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from guests.module import parse_guest
from guests.shipped import llama_wasm
from guests.wasm_format import Section, SectionId, join_sections
from snapshots.blob_reference import BlobRef
from snapshots.errors import SnapshotNotFound
from snapshots.keyring import KeyRing
from snapshots.manifest import GUEST_ASSETS
from snapshots.mapping import SealedBlob, seal_blob
from tests.checkpoint_files import DATA
from tests.model_fixtures import BuiltState, new_state
from worker.build.command import build
from worker.build.errors import BuildError
from worker.build.hf_source import open_hugging_face
from worker.build.priming import Priming
from worker.build.snapshot_builder import build_snapshot
from worker.build.weights_reuse import build_over_weights
from worker.sealed_cache import SealedCache


def other_guest() -> bytes:
    """The llama guest as somebody else might ship it: it does the same and is another module (one more type)."""

    def extend(section: Section) -> Section:
        if section.id is not SectionId.TYPE:
            return section
        count, types = section.body[0], section.body[1:]
        assert count < 127  # one byte of LEB128
        return Section(section.id, bytes([count + 1]) + types + b"\x60\x00\x00")

    return join_sections([extend(section) for section in parse_guest(llama_wasm()).sections])


@pytest.fixture
def built(tmp_path: Path) -> BuiltState:
    """A state folder with the tiny model."""
    state = new_state(tmp_path / "state")
    with open_hugging_face(DATA / "tiny_llama") as source:
        build_snapshot(source, "donor", state.store, state.keyring)
    return state


def list_blobs(built: BuiltState) -> set[str]:
    """Addresses of all blobs on disk."""
    return {path.name for path in (built.state_dir / "store" / "blobs").glob("*/*")}


def test_another_guest_over_the_same_weights_writes_no_second_weights_blob(built: BuiltState) -> None:
    """One weights file for both snapshots; the guest's own blobs are new; both verify and are collected rightly."""
    donor, before = built.manifest("donor"), list_blobs(built)
    report = build_over_weights("donor", "tenant-b", built.store, built.keyring, guest_wasm=other_guest())
    tenant = built.manifest("tenant-b")
    assert tenant.weights == donor.weights
    assert tenant.tensors == donor.tensors
    assert tenant.programs == donor.programs
    added = list_blobs(built) - before
    assert donor.weights.address not in added
    assert tenant.guest_wasm.digest != donor.guest_wasm.digest
    assert added == {tenant.guest_wasm.address, tenant.guest_cwasm.address} - before
    assert report.weights_bytes == donor.weights.size_bytes
    assert built.store.verify("tenant-b", built.keyring) == []
    built.store.remove("donor")
    built.store.collect_garbage(built.keyring, grace_s=-1)
    assert built.store.verify("tenant-b", built.keyring) == []


def test_two_builds_of_one_source_share_their_weights_too(built: BuiltState) -> None:
    """Content addressing alone: the same source under another name adds no weights blob."""
    before = list_blobs(built)
    with open_hugging_face(DATA / "tiny_llama") as source:
        build_snapshot(source, "again", built.store, built.keyring)
    assert built.manifest("again").weights.digest == built.manifest("donor").weights.digest
    assert list_blobs(built) == before


async def test_sealed_cache_holds_shared_weights_once(built: BuiltState) -> None:
    """Sealed by digest: workers of both snapshots get the same memory file, and it goes when the last one goes."""
    build_over_weights(
        "donor", "tenant-b", built.store, built.keyring, guest_wasm=other_guest(), priming=Priming(texts=("once upon",))
    )
    sealed: list[str] = []

    def seal(path: Path, ref: BlobRef, label: str) -> SealedBlob:
        sealed.append(ref.digest)
        return seal_blob(path, ref, label=label)

    cache = SealedCache(built.store.blob_path, seal, 1 << 30)
    donor, tenant = built.manifest("donor"), built.manifest("tenant-b")
    first = await cache.acquire(donor.snapshot_id, donor, "w1")
    second = await cache.acquire(tenant.snapshot_id, tenant, "w2")
    assert sealed.count(donor.weights.digest) == 1
    assert os.fstat(first.weights_fd).st_ino == os.fstat(second.weights_fd).st_ino
    assert len(first.all) == 2
    assert len(second.all) == 3
    cache.check_integrity()
    cache.release("w1")
    assert cache.forget("donor")
    assert os.fstat(second.weights_fd).st_size == donor.weights.size_bytes
    cache.check_integrity()
    cache.close()


def test_snapshot_without_assets_or_with_a_foreign_guest_is_refused(built: BuiltState) -> None:
    """What cannot be built over stored weights is said by name, and nothing gets the new name."""
    donor = built.manifest("donor")
    with pytest.raises(SnapshotNotFound):
        build_over_weights("nobody", "x", built.store, built.keyring)
    with pytest.raises(BuildError, match="the guest refuses this model"):
        build_over_weights("donor", "x", built.store, built.keyring, guest_wasm=b"\0asm\1\0\0\0")
    with pytest.raises(BuildError, match="not encrypted"):
        build_over_weights("donor", "x", built.store, built.keyring, encrypt=True)
    without = {role: ref for role, ref in donor.blobs.items() if role != GUEST_ASSETS}
    built.store.write_manifest(msgspec.structs.replace(donor, name="old", blobs=without), built.keyring)
    with pytest.raises(BuildError, match="assets"):
        build_over_weights("old", "x", built.store, built.keyring)
    assert "x" not in built.store.list_names()


def test_command_builds_over_weights_and_primes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--guest``, ``--weights-of``, ``--prime-system-prompt`` and ``--prime-text`` from the command line."""
    monkeypatch.setattr("worker.build.command.configure_logging", lambda **_: None)
    keyring = KeyRing.generate_file(tmp_path / "keys" / "snapshot.keys")
    guest, system, text = tmp_path / "my.wasm", tmp_path / "system.txt", tmp_path / "text.txt"
    guest.write_bytes(other_guest())
    system.write_text("You answer in one word.\n")
    text.write_text("It was a dark and stormy night")

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(build, [*arguments, "--state-dir", str(tmp_path)])
        return result.output if result.exit_code == 0 else f"exit {result.exit_code}: {result.output}"

    assert run(str(DATA / "tiny_llama"), "--name", "donor").startswith("snapshot  donor")
    options = ("--guest", str(guest), "--prime-system-prompt", str(system), "--prime-text", str(text))
    shown = run("--weights-of", "donor", "--name", "tenant-b", *options)
    assert "primed" in shown
    store = BuiltState(tmp_path).store
    manifests = [store.read_manifest(name, keyring) for name in ("donor", "tenant-b")]
    assert manifests[0].weights == manifests[1].weights
    assert len(manifests[1].prefixes) == 2
    assert "exit 2" in run("--name", "neither")
    assert "exit 2" in run(str(DATA / "tiny_llama"), "--name", "both", "--weights-of", "donor")
    assert "keep the type" in run("--name", "typed", "--weights-of", "donor", "--dtype", "f32")
    text.write_bytes(b"\xff\xfe")
    assert "not UTF-8" in run("--name", "binary", "--weights-of", "donor", "--prime-text", str(text))
    text.write_bytes(b"")
    assert "1 to 4194304 bytes" in run("--name", "empty", "--weights-of", "donor", "--prime-text", str(text))
