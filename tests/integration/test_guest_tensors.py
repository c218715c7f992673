"""Tensors that a guest makes at init: stored, signed, mapped read-only, named by programs, bounded."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import numpy as np
import pytest
from guest_fixtures import wat_guest
from llama_programs import compute_logits

from guests.abi import TensorType
from guests.confined_work import InitialisedReply
from guests.errors import GuestContractError, GuestProcessError
from guests.guest_tensors import MAX_GUEST_TENSOR_BYTES, MAX_GUEST_TENSORS, GuestTensor, GuestTensors, check_tensors
from guests.initialisation import run_initialisation
from guests.initialise import _check_reply, initialise_guest
from guests.runtime import GuestEngine
from guests.shipped import bias_wasm, llama_wasm
from snapshots.errors import ManifestMalformed, MappingError
from snapshots.manifest import GUEST_TENSORS, Manifest, validate_manifest
from snapshots.mapping import seal_blob
from tests.checkpoint_files import DATA
from tests.model_fixtures import BuiltState, new_state
from worker.backends.choice import make_backend
from worker.backends.protocol import ModelPlan, SequenceInput
from worker.build.hf_source import open_hugging_face
from worker.build.snapshot_builder import build_snapshot
from worker.build.weights_reuse import build_over_weights
from worker.restore import restore_model

NEVER = np.float32(-1e9)
ALLOC = (
    '(import "glowplug" "tensor_alloc" (func $alloc (param i32 i32 i32 i32 i32) (result i32)))'
    '(import "glowplug" "tensor_write" (func $write (param i32 i64 i32 i32) (result i32)))'
)
#: "embed" at 0, "mine" at 8, a shape [2, 3] at 16, six floats at 32.
DATA_SEGMENT = '(data (i32.const 0) "embed\\00\\00\\00mine\\00\\00\\00\\00\\02\\00\\00\\00\\03\\00\\00\\00")'


def guest_that(init: str, shape_bytes: bytes = b"") -> bytes:
    """A guest in text whose init does ``init``; ``shape_bytes`` at 64."""
    shape = "".join(f"\\{byte:02x}" for byte in shape_bytes)
    data = f'{DATA_SEGMENT} (data (i32.const 64) "{shape}")'
    return wat_guest(data, init=init, imports=ALLOC)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> BuiltState:
    """The tiny model, and over its weights the guest that computes a bias."""
    state = new_state(tmp_path_factory.mktemp("made") / "state")
    with open_hugging_face(DATA / "tiny_qwen2") as source:
        build_snapshot(source, "plain", state.store, state.keyring, guest_wasm=llama_wasm())
    build_over_weights("plain", "biased", state.store, state.keyring, guest_wasm=bias_wasm())
    return state


@pytest.fixture
def sealed(built: BuiltState) -> Iterator[tuple[Manifest, list[int]]]:
    """The snapshot with the bias, as an agent hands it over."""
    manifest = built.manifest("biased")
    with ExitStack() as stack:
        yield (
            manifest,
            [stack.enter_context(seal_blob(built.store.blob_path(ref), ref)).fd for ref in manifest.worker_blobs],
        )


def test_a_computed_tensor_is_stored_signed_and_used_like_a_weight(
    built: BuiltState, sealed: tuple[Manifest, list[int]]
) -> None:
    """The bias lies in a blob of its own; restored, it is a read-only weight behind its handle, and a step adds it."""
    manifest, fds = sealed
    (entry,) = manifest.guest_tensors
    assert (entry.name, entry.dtype, entry.shape) == ("bias", "F32", (manifest.card.vocab_size,))
    assert manifest.tensor_handles == ("embed.weight", "bias")
    assert manifest.weights == built.manifest("plain").weights
    assert GUEST_TENSORS in manifest.worker_roles
    assert not built.store.verify("biased", built.keyring)
    with GuestEngine() as engine:
        engine.start_ticker()
        restored = restore_model(manifest, fds[0], fds[1], engine, 1, *fds[2:])
        plan = restored.loaded.plan
        assert isinstance(plan, ModelPlan)
        bias = plan.tensors[1].data
        assert not bias.flags.writeable
        assert bias[:3].tolist() == [NEVER] * 3
        assert not bias[3:].any()
        bound = make_backend("numpy", 1).bind(plan)
        bound.open_kv(1)
        logits = compute_logits(bound, SequenceInput((0,), 0, (5, 7)))[0]
        embed = plan.tensors[0].data.astype(np.float32)
        np.testing.assert_allclose(logits, embed @ embed[7] + bias, rtol=1e-5, atol=1e-5)
        bound.close()
        del bias, plan, bound, embed, logits
        restored.close()


def test_a_snapshot_with_computed_tensors_needs_their_memory(sealed: tuple[Manifest, list[int]]) -> None:
    """Without the descriptor, or with another's, nothing is mapped."""
    manifest, fds = sealed
    with GuestEngine() as engine:
        for further in ((), (fds[0],)):
            with pytest.raises(MappingError):
                restore_model(manifest, fds[0], fds[1], engine, 1, *further)


def test_a_changed_byte_of_a_computed_tensor_is_refused(built: BuiltState, tmp_path: Path) -> None:
    """It is verified chunk by chunk, like weights."""
    ref = built.manifest("biased").blobs[GUEST_TENSORS]
    data = bytearray(built.store.blob_path(ref).read_bytes())
    data[-1] ^= 1
    changed = tmp_path / "blob"
    changed.write_bytes(data)
    with pytest.raises(Exception, match="chunk 0"):
        os.close(seal_blob(changed, ref).fd)


@pytest.mark.parametrize("change", ["no blob", "no section", "name of a weight", "beyond the blob"])
def test_a_manifest_whose_computed_tensors_do_not_fit_is_refused(built: BuiltState, change: str) -> None:
    """Section and blob come together, names are unique over both tables, places lie inside the blob."""
    manifest = built.manifest("biased")
    (entry,) = manifest.guest_tensors
    blobs = dict(manifest.blobs)
    tensors = {
        "no blob": (entry,),
        "no section": (),
        "name of a weight": (msgspec.structs.replace(entry, name="embed.weight"),),
        "beyond the blob": (msgspec.structs.replace(entry, offset=entry.offset + (1 << 20)),),
    }[change]
    if change == "no blob":
        del blobs[GUEST_TENSORS]
    with pytest.raises(ManifestMalformed):
        validate_manifest(msgspec.structs.replace(manifest, blobs=blobs, guest_tensors=tensors))


def test_what_was_written_is_what_is_kept() -> None:
    """Zeros, and over them what was written; a name that is taken gives -1, and asking for it the same handle."""
    init = """
      (if (i32.ne (call $alloc (i32.const 0) (i32.const 5) (i32.const 0) (i32.const 16) (i32.const 8))
                  (i32.const -1)) (then unreachable))
      (if (i32.ne (call $alloc (i32.const 8) (i32.const 4) (i32.const 0) (i32.const 16) (i32.const 8))
                  (i32.const 0)) (then unreachable))
      (if (i32.ne (call $alloc (i32.const 8) (i32.const 4) (i32.const 0) (i32.const 16) (i32.const 8))
                  (i32.const -1)) (then unreachable))
      (if (i32.ne (call $tensor (i32.const 8) (i32.const 4)) (i32.const 0)) (then unreachable))
      (if (i32.ne (call $tensor (i32.const 0) (i32.const 5)) (i32.const 1)) (then unreachable))
      (drop (call $write (i32.const 0) (i64.const 4) (i32.const 16) (i32.const 8)))
    """
    guest = initialise_guest(guest_that(init), {}, ["embed"])
    (made,) = guest.tensors
    assert (made.name, made.dtype, made.shape) == ("mine", TensorType.F32, (2, 3))
    assert struct.unpack("<6I", bytes(made.data)) == (0, 2, 3, 0, 0, 0)
    assert guest.tensor_handles == ("mine", "embed")


def alloc(shape_at: int, shape_bytes: int, dtype: int = 0) -> str:
    return (
        f"(drop (call $alloc (i32.const 8) (i32.const 4) (i32.const {dtype}) (i32.const {shape_at})"
        f" (i32.const {shape_bytes})))"
    )


HOSTILE = {
    "type": (alloc(16, 8, dtype=7), b"", "type 7"),
    "no dimension": (alloc(16, 0), b"", "shape"),
    "half a size": (alloc(16, 7), b"", "7 bytes"),
    "nine dimensions": (alloc(16, 36), b"", "at most 32"),
    "empty dimension": (alloc(64, 8), struct.pack("<2I", 3, 0), "shape"),
    "too many bytes": (alloc(64, 4), struct.pack("<I", MAX_GUEST_TENSOR_BYTES // 4 + 1), "at most 268435456"),
    "product that would overflow": (alloc(64, 32), struct.pack("<8I", *[0xFFFFFFFF] * 8), "at most 268435456"),
    "foreign handle": ("(drop (call $write (i32.const 5) (i64.const 0) (i32.const 0) (i32.const 4)))", b"", "handle 5"),
    "a weight": (
        "(drop (call $write (call $tensor (i32.const 0) (i32.const 5)) (i64.const 0) (i32.const 0) (i32.const 4)))",
        b"",
        "handle 0",
    ),
    "beyond its end": (
        alloc(16, 8) + "(drop (call $write (i32.const 0) (i64.const 17) (i32.const 0) (i32.const 8)))",
        b"",
        "offset 17",
    ),
    "negative offset": (
        alloc(16, 8) + "(drop (call $write (i32.const 0) (i64.const -1) (i32.const 0) (i32.const 1)))",
        b"",
        "offset -1",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tensors_end_the_initialisation(name: str) -> None:
    """Types, shapes, sizes, handles and offsets that cannot be: an error that says so, nothing is kept."""
    init, shape, reason = HOSTILE[name]
    with pytest.raises(GuestContractError, match=reason):
        run_initialisation(guest_that(init, shape), {}, ["embed"])


def test_count_and_bytes_of_all_together_are_bounded() -> None:
    """1,024 tensors and 256 MiB: the next one is refused, whatever its own size."""
    tensors = GuestTensors()
    for number in range(MAX_GUEST_TENSORS):
        tensors.allocate(number, f"t{number}", TensorType.BF16, struct.pack("<I", 1))
    with pytest.raises(GuestContractError, match="more than 1024"):
        tensors.allocate(MAX_GUEST_TENSORS, "one more", TensorType.BF16, struct.pack("<I", 1))
    tensors = GuestTensors()
    tensors.allocate(0, "first", TensorType.F32, struct.pack("<I", 16))
    with pytest.raises(GuestContractError, match="of tensors, at most"):
        tensors.allocate(1, "all the rest", TensorType.F32, struct.pack("<I", MAX_GUEST_TENSOR_BYTES // 4))


@pytest.mark.parametrize("lie", ["size", "name of a weight", "no handle", "twice", "reserved name"])
def test_a_confined_process_that_lies_about_tensors_is_not_believed(lie: str) -> None:
    """The reply is checked as if the guest's author had written it."""
    guest = initialise_guest(guest_that(alloc(16, 8)), {}, ["embed"])
    name, handles, data = "mine", ("mine",), bytes(24)
    entries = [(name, 0, (2, 3))]
    match lie:
        case "size":
            data = bytes(20)
        case "name of a weight":
            entries, handles = [("embed", 0, (2, 3))], ("embed",)
        case "no handle":
            handles = ()
        case "twice":
            entries *= 2
        case "reserved name":
            entries, handles = [("pad.1", 0, (2, 3))], ("pad.1",)
    attachments = [guest.baked_wasm, *guest.programs.values(), *[data] * len(entries)]
    reply = InitialisedReply(
        sizes=(),
        layers=(),
        program_kinds=tuple(kind.value for kind in guest.programs),
        tensor_handles=handles,
        log=(),
        host_bytes=0,
        tensors=tuple(entries),
    )
    with pytest.raises(GuestProcessError):
        _check_reply(reply, attachments, frozenset({"embed"}))


def test_tensors_are_checked_together() -> None:
    """Two of one name are refused."""
    one = GuestTensor("a", TensorType.F32, (1,), bytes(4))
    check_tensors([one])
    with pytest.raises(GuestContractError):
        check_tensors([one, one])
