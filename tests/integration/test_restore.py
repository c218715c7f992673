"""Restore of the real model out of sealed memory: views without copies, the guest's answers, and every refusal."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import ml_dtypes
import msgspec
import numpy as np
import pytest
from llama_programs import compute_logits

from guests.program import Program
from guests.runtime import GuestEngine
from snapshots.errors import Incompatible, ManifestMalformed, MappingError
from snapshots.manifest import Manifest
from snapshots.mapping import SealedBlob, seal_blob
from tests.checkpoint_files import DATA
from tests.model_fixtures import SMOLLM2, BuiltState, new_state
from worker.backends.numpy_reference import NumpyBackend
from worker.backends.protocol import SequenceInput
from worker.build.hf_source import open_hugging_face
from worker.build.quantize import WeightFormat
from worker.build.snapshot_builder import build_snapshot
from worker.restore import RestoredModel, prepare_restore, restore_model

PROMPT = "<|im_start|>user\nHi<|im_end|>\n"


class Sealed:
    """A snapshot's manifest and its sealed blobs."""

    def __init__(self, manifest: Manifest, weights: SealedBlob, guest: SealedBlob) -> None:
        self.manifest = manifest
        self.weights = weights
        self.guest = guest

    def restore(self, engine: GuestEngine, manifest: Manifest | None = None) -> RestoredModel:
        return restore_model(manifest or self.manifest, self.weights.fd, self.guest.fd, engine, seed=7)


def _seal(built: BuiltState, name: str, stack: ExitStack) -> Sealed:
    manifest = built.manifest(name)
    blobs = [
        stack.enter_context(seal_blob(built.store.blob_path(ref), ref))
        for ref in (manifest.weights, manifest.guest_cwasm)
    ]
    return Sealed(manifest, *blobs)


@pytest.fixture(scope="module")
def smollm2(smollm2_built: BuiltState) -> Iterator[Sealed]:
    with ExitStack() as stack:
        yield _seal(smollm2_built, SMOLLM2, stack)


@pytest.fixture(scope="module")
def tiny_int8(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sealed]:
    built = new_state(tmp_path_factory.mktemp("tiny") / "state")
    with open_hugging_face(DATA / "tiny_llama") as source:
        build_snapshot(source, "tiny", built.store, built.keyring, weight_format=WeightFormat.INT8)
    with ExitStack() as stack:
        yield _seal(built, "tiny", stack)


@pytest.fixture(scope="module")
def engine() -> Iterator[GuestEngine]:
    prepare_restore()
    with GuestEngine() as engine:
        yield engine


def test_the_plan_is_made_of_read_only_views(smollm2: Sealed, engine: GuestEngine) -> None:
    """Matrices bfloat16, vectors float32, every one where the manifest says in the one mapping, none writable."""
    with smollm2.restore(engine) as model:
        plan = model.loaded.plan
        entries = {entry.name: entry for entry in smollm2.manifest.tensors}
        first = min(tensor.data.ctypes.data - entries[tensor.name].offset for tensor in plan.tensors)
        for handle, tensor in enumerate(plan.tensors):
            assert tensor.name == smollm2.manifest.tensor_handles[handle]
            assert tensor.data.ctypes.data - entries[tensor.name].offset == first
            assert tensor.data.dtype == (ml_dtypes.bfloat16 if tensor.data.ndim == 2 else np.float32)
            assert not tensor.data.flags.writeable
            assert tensor.scale is None
        del tensor, plan


def test_the_model_knows_its_shape_and_text(smollm2: Sealed, engine: GuestEngine) -> None:
    """Card figures reach the plan, and the guest tokenises without its init running again."""
    with smollm2.restore(engine) as model:
        loaded = model.loaded
        assert (loaded.name, loaded.snapshot_id) == (SMOLLM2, smollm2.manifest.snapshot_id)
        assert loaded.eos_token_ids[0] == 2
        plan = loaded.plan
        assert (plan.num_layers, plan.num_kv_heads, plan.head_dim) == (30, 3, 64)
        assert (plan.vocab_size, plan.context_length) == (49_152, 8192)
        assert isinstance(plan.prefill, Program)
        ids = loaded.text.tokenize(PROMPT, add_special=True, parse_special=True)
        assert ids[0] == 1
        assert loaded.text.detokenize(ids, show_special=True) == PROMPT
        del loaded, plan


def test_greedy_tokens_are_the_float32_references(smollm2: Sealed, engine: GuestEngine) -> None:
    """The first reference prompt, tokenised by the guest and run on the reference backend, token for token."""
    vectors = json.loads((DATA / "smollm2_greedy.json").read_text())
    with smollm2.restore(engine) as model:
        ids = model.loaded.text.tokenize(vectors["rendered"], add_special=True, parse_special=True)
        assert ids == vectors["prompt_tokens"]
        bound = NumpyBackend().bind(model.loaded.plan)
        bound.open_kv(16)
        table = tuple(range(16))
        logits = compute_logits(bound, SequenceInput(table, 0, tuple(ids)))
        for position, expected in enumerate(vectors["generated"], start=len(ids)):
            token_id = int(logits[0].argmax())
            assert token_id == expected
            logits = compute_logits(bound, SequenceInput(table, position, (token_id,)))
        bound.close()
        del bound, logits


def test_int8_weights_come_with_their_scales(tiny_int8: Sealed, engine: GuestEngine) -> None:
    """A quantised matrix is int8 with float32 scales of its rows; handles still name the matrix."""
    with tiny_int8.restore(engine) as model:
        matrices = [tensor for tensor in model.loaded.plan.tensors if tensor.data.ndim == 2]
        assert matrices
        for tensor in matrices:
            assert tensor.data.dtype == np.int8
            assert tensor.scale is not None
            assert tensor.scale.shape == tensor.data.shape[:1]
        del matrices, tensor


def test_int8_without_scales_is_malformed(tiny_int8: Sealed, engine: GuestEngine) -> None:
    """A manifest that lost the scales of a matrix is refused by the matrix's name."""
    kept = tuple(entry for entry in tiny_int8.manifest.tensors if entry.name != "layers.1.o.weight_scale")
    with pytest.raises(ManifestMalformed, match=r"layers\.1\.o\.weight"):
        tiny_int8.restore(engine, msgspec.structs.replace(tiny_int8.manifest, tensors=kept))


def test_descriptors_may_be_closed_after_the_restore(tiny_int8: Sealed, engine: GuestEngine) -> None:
    """The mappings keep the memory; the worker need not keep descriptors."""
    fds = [os.dup(tiny_int8.weights.fd), os.dup(tiny_int8.guest.fd)]
    model = restore_model(tiny_int8.manifest, *fds, engine, seed=0)
    for fd in fds:
        os.close(fd)
    assert model.loaded.text.tokenize("hello", add_special=False, parse_special=False)
    assert float(np.abs(model.loaded.plan.tensors[0].data.astype(np.float32)).sum()) > 0
    model.close()


def test_populate_enters_every_page_and_can_be_stopped(smollm2: Sealed, engine: GuestEngine) -> None:
    """After populate all bytes of the weights are resident in this process; a set event stops it at once."""
    with smollm2.restore(engine) as model:
        stop = threading.Event()
        stop.set()
        model.populate(stop)
        mapped = model._prepared.weights
        assert mapped.statistics().resident_bytes < smollm2.manifest.weights.size_bytes // 2
        model.populate()
        tensor_bytes = sum(entry.size_bytes for entry in smollm2.manifest.tensors)
        assert mapped.statistics().resident_bytes >= tensor_bytes


def test_closing_is_refused_while_a_weight_is_in_use(tiny_int8: Sealed, engine: GuestEngine) -> None:
    """Unmapping under a living array would crash the process; afterwards close is idempotent."""
    model = tiny_int8.restore(engine)
    weight = model.loaded.plan.tensors[0].data
    with pytest.raises(MappingError, match="still in use"):
        model.close()
    del weight
    model.close()
    model.close()
    with pytest.raises(RuntimeError):
        _ = model.loaded


@pytest.mark.parametrize("key", ["wasmtime", "config", "target"])
def test_a_guest_for_another_environment_is_refused(tiny_int8: Sealed, engine: GuestEngine, key: str) -> None:
    """Identity is compared before anything is mapped; the message says how to rebuild."""
    identity = {**tiny_int8.manifest.identity, key: "other"}
    with pytest.raises(Incompatible, match=r"glowplug build SOURCE --name tiny") as caught:
        tiny_int8.restore(engine, msgspec.structs.replace(tiny_int8.manifest, identity=identity))
    assert key in str(caught.value)


def test_a_cpu_without_a_needed_feature_is_refused(tiny_int8: Sealed, engine: GuestEngine) -> None:
    """Features that the compiled guest needs and this machine lacks are named."""
    identity = {**tiny_int8.manifest.identity, "cpu_features": "has_future_simd"}
    with pytest.raises(Incompatible, match="has_future_simd"):
        tiny_int8.restore(engine, msgspec.structs.replace(tiny_int8.manifest, identity=identity))


@pytest.mark.parametrize("part", ["weights", "guest"])
def test_memory_that_is_not_sealed_is_refused(
    tiny_int8: Sealed, engine: GuestEngine, tmp_path: Path, part: str
) -> None:
    """The right bytes in a plain file, which could still change, are neither mapped nor executed."""
    sealed: SealedBlob = getattr(tiny_int8, part)
    path = tmp_path / part
    path.write_bytes(os.pread(sealed.fd, sealed.size_bytes, 0))
    fds = {"weights": tiny_int8.weights.fd, "guest": tiny_int8.guest.fd}
    with path.open("rb") as file:
        fds[part] = file.fileno()
        with pytest.raises(MappingError):
            restore_model(tiny_int8.manifest, fds["weights"], fds["guest"], engine, seed=0)


def test_exchanged_descriptors_are_refused(tiny_int8: Sealed, engine: GuestEngine) -> None:
    """Weights where the guest should be have another size than the manifest says."""
    with pytest.raises(MappingError, match="expected"):
        restore_model(tiny_int8.manifest, tiny_int8.guest.fd, tiny_int8.weights.fd, engine, seed=0)


def test_exchanged_programs_are_refused(tiny_int8: Sealed, engine: GuestEngine) -> None:
    """A decode program in the prefill's place is malformed."""
    programs = tiny_int8.manifest.programs
    swapped = msgspec.structs.replace(programs, prefill=programs.decode, decode=programs.prefill)
    with pytest.raises(ManifestMalformed, match="prefill"):
        tiny_int8.restore(engine, msgspec.structs.replace(tiny_int8.manifest, programs=swapped))
