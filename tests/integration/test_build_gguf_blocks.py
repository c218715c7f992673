"""``build --quantize gguf``: blocks reach the device as they lie in the file, signed; what does not fit is refused."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from cuda_device_fixtures import make_device, make_resources
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from llama_programs import compute_logits
from safetensors import safe_open

from guests.runtime import GuestEngine
from scheduler.command import main
from scheduler.contract import environment
from snapshots.errors import BlobCorrupt, ManifestMalformed
from snapshots.manifest import Manifest, validate_manifest
from snapshots.mapping import seal_blob
from tests.block_fixtures import random_blocks
from tests.checkpoint_files import DATA, FloatArray, gguf_metadata
from tests.model_fixtures import BuiltState, new_state
from worker.backends.cuda.cuda_model import CudaModel
from worker.backends.cuda.weight_stream import StreamSettings
from worker.backends.numkong_cpu import NumKongBackend
from worker.backends.numpy_reference import NumpyBackend
from worker.backends.protocol import Backend, BackendError, ModelPlan, SequenceInput
from worker.build.errors import BuildError, MalformedModelError
from worker.build.gguf_source import open_gguf
from worker.build.quantize import WeightFormat
from worker.build.snapshot_builder import build_snapshot
from worker.build.weights_reuse import build_over_weights
from worker.restore import RestoredModel, restore_model

HIDDEN, WIDTH, HEAD_DIM, VOCAB = 256, 256, 16, 288
#: Shape and type of each matrix of a layer. Queries, keys and values agree; gate and up do not.
LAYER = {
    "attn_q": ((4 * HEAD_DIM, HIDDEN), "Q4_K"),
    "attn_k": ((2 * HEAD_DIM, HIDDEN), "Q4_K"),
    "attn_v": ((2 * HEAD_DIM, HIDDEN), "Q4_K"),
    "attn_output": ((HIDDEN, 4 * HEAD_DIM), "Q4_1"),
    "ffn_gate": ((WIDTH, HIDDEN), "Q4_0"),
    "ffn_up": ((WIDTH, HIDDEN), "Q8_0"),
    "ffn_down": ((HIDDEN, WIDTH), "Q6_K"),
}
TOP = {"token_embd": ((VOCAB, HIDDEN), "Q5_0"), "output": ((VOCAB, HIDDEN), "Q4_0")}
#: What the snapshot stores of it.
STORED = {
    "embed.weight": "Q8_0",
    "layers.0.qkv.weight": "Q4_K",
    "layers.0.o.weight": "Q4_1",
    "layers.0.gate_up.weight": "Q8_0",
    "layers.0.down.weight": "Q6_K",
    "layers.1.o.weight": "BF16",
    "lm_head.weight": "Q4_0",
}


@pytest.fixture
def state(tmp_path: Path) -> BuiltState:
    return new_state(tmp_path / "state")


@pytest.fixture(scope="module")
def engine() -> Iterator[GuestEngine]:
    with GuestEngine() as engine:
        yield engine


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with matrices of every kind; one of the second layer is not quantised."""
    return write_model(tmp_path_factory.mktemp("model") / "model.gguf")


def write_model(path: Path, *, poisoned: str = "") -> Path:
    """``poisoned``: a matrix whose first scale is made infinite."""
    rng = np.random.default_rng(5)
    metadata = gguf_metadata("tiny_llama", "llama")
    for key, value in {
        "embedding_length": HIDDEN,
        "feed_forward_length": WIDTH,
        "attention.key_length": HEAD_DIM,
    }.items():
        metadata[f"llama.{key}"] = value
    matrices = {f"blk.{i}.{name}.weight": entry for i in range(2) for name, entry in LAYER.items()}
    matrices |= {f"{name}.weight": entry for name, entry in TOP.items()}
    writer = GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if key != "general.architecture":
            {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}[
                type(value)
            ](key, value)
    for name in ("output_norm", *(f"blk.{i}.{part}_norm" for i in range(2) for part in ("attn", "ffn"))):
        writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, np.float32))
    for name, (shape, kind) in matrices.items():
        rows = make_rows(rng, shape, kind)
        if name == poisoned:
            rows[0, :2] = (0, 0x7C)  # float16 infinity
        if name == "blk.1.attn_output.weight":
            writer.add_tensor(name, dequantize(rows, GGMLQuantizationType[kind]).astype(np.float16))
        else:
            writer.add_tensor(name, rows, raw_dtype=GGMLQuantizationType[kind])
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return path


def make_rows(rng: np.random.Generator, shape: tuple[int, int], kind: str) -> np.ndarray:
    """Rows of any type: random blocks where a snapshot keeps them."""
    deviation = 1.5 * shape[1] ** -0.5
    if kind == "Q5_0":
        return quantize(rng.normal(0, deviation, shape).astype(np.float32), GGMLQuantizationType.Q5_0)
    return random_blocks(rng, shape, kind, deviation)


def build(state: BuiltState, path: Path, name: str, weight_format: WeightFormat) -> Manifest:
    with open_gguf(path) as source:
        build_snapshot(source, name, state.store, state.keyring, weight_format=weight_format)
    return state.manifest(name)


def restore(state: BuiltState, name: str, engine: GuestEngine) -> RestoredModel:
    manifest = state.manifest(name)
    paths = [(state.store.blob_path(ref), ref) for ref in (manifest.weights, manifest.guest_cwasm)]
    with seal_blob(*paths[0]) as weights, seal_blob(*paths[1]) as guest:
        return restore_model(manifest, weights.fd, guest.fd, engine, seed=1)


def logits_of(backend: Backend, plan: ModelPlan) -> FloatArray:
    """A prefill of 12 tokens, then two decodes."""
    bound = backend.bind(plan)
    bound.open_kv(2)
    rows = [compute_logits(bound, SequenceInput((0, 1), 0, tuple(range(40, 52))))[0]]
    rows += [compute_logits(bound, SequenceInput((0, 1), 12 + i, (7 + i,)))[0] for i in range(2)]
    bound.close()
    return np.stack(rows)


def read_matrices(plan: ModelPlan) -> dict[str, tuple[str, np.ndarray]]:
    """Block type and bytes of every matrix, copies."""
    return {tensor.name: (tensor.block_type, tensor.data.copy()) for tensor in plan.tensors}


def refusal_of(backend: Backend, plan: ModelPlan) -> str:
    """What ``backend`` says instead of binding; without the traceback, which holds views."""
    said = "it was bound"
    try:
        backend.bind(plan)
    except BackendError as error:
        said = str(error)
    gc.collect()  # what was half bound refers to itself
    return said


class _Device:
    """A backend of one emulated device that is not warmed up."""

    def bind(self, plan: ModelPlan) -> CudaModel:
        return CudaModel(plan, make_resources(make_device(), StreamSettings(2, 3, 1 << 20)))


def test_blocks_are_kept_through_build_store_and_restore(
    state: BuiltState, engine: GuestEngine, model_file: Path
) -> None:
    """What is kept is the file's bytes (rows of heads re-ordered); its values are exactly those of a float32 build; the
    reference and the GPU backend compute the same from it; NumKong refuses it and says what to do."""
    manifest = build(state, model_file, "blocks", WeightFormat.GGUF)
    assert manifest.card.weight_format == "gguf"
    stored = {entry.name: entry.dtype for entry in manifest.tensors}
    assert {name: stored[name] for name in STORED} == STORED
    assert not state.store.verify("blocks", state.keyring)
    build(state, model_file, "plain", WeightFormat.F32)
    with restore(state, "plain", engine) as model:
        exact, expected = read_matrices(model.loaded.plan), logits_of(NumpyBackend(), model.loaded.plan)
    with restore(state, "blocks", engine) as model:
        kept, found = read_matrices(model.loaded.plan), logits_of(NumpyBackend(), model.loaded.plan)
        on_device = logits_of(_Device(), model.loaded.plan)  # type: ignore[arg-type]  # it binds, and that is all
        refused = refusal_of(NumKongBackend(), model.loaded.plan)
    for name, (kind, rows) in kept.items():
        if kind in ("Q4_K", "Q4_1", "Q6_K", "Q4_0"):
            np.testing.assert_array_equal(dequantize(rows, GGMLQuantizationType[kind]), exact[name][1], name)
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()  # what became Q8_0 or BF16
    assert np.abs(on_device - found).max() < 0.03 * np.abs(found).max()  # one matrix is bf16: so are activations
    assert "--quantize int8" in refused


def test_other_readers_see_rows_of_bytes(state: BuiltState, model_file: Path) -> None:
    """The weights blob stays a safetensors file; a snapshot over these weights has as many parameters."""
    manifest = build(state, model_file, "blocks", WeightFormat.GGUF)
    with safe_open(state.store.blob_path(manifest.weights), "np") as file:
        down = file.get_slice("layers.0.down.weight")
        assert (down.get_dtype(), down.get_shape()) == ("U8", [HIDDEN, WIDTH // 256 * 210])
    with open_gguf(model_file) as source:
        expected = sum(int(np.prod(tensor.shape)) for tensor in source.tensors if tensor.name != "rope.inv_freq")
    report = build_over_weights("blocks", "over", state.store, state.keyring)
    assert report.weight_format is WeightFormat.GGUF
    assert report.num_parameters == expected


def test_mangled_entries_are_refused(state: BuiltState, model_file: Path) -> None:
    """A block type that does not fit shape or size, or that nobody reads, is no manifest; a changed byte no blob."""
    manifest = build(state, model_file, "blocks", WeightFormat.GGUF)
    (down,) = [entry for entry in manifest.tensors if entry.name == "layers.0.down.weight"]
    for change, reason in (
        ({"dtype": "Q2_K"}, "dtype 'Q2_K', expected one of"),
        ({"dtype": "Q4_K"}, "bytes do not fit shape"),
        ({"shape": (HIDDEN, WIDTH - 1)}, "no matrix of whole Q6_K blocks"),
        ({"shape": (HIDDEN * WIDTH,)}, "no matrix of whole Q6_K blocks"),
        ({"shape": (HIDDEN, 2 * WIDTH)}, "bytes do not fit shape"),
    ):
        tensors = tuple(msgspec.structs.replace(e, **change) if e is down else e for e in manifest.tensors)
        with pytest.raises(ManifestMalformed, match=reason):
            validate_manifest(msgspec.structs.replace(manifest, tensors=tensors))
    blob = state.store.blob_path(manifest.weights)
    data = bytearray(blob.read_bytes())
    data[down.offset + 5] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(data)
    with pytest.raises(BlobCorrupt):
        seal_blob(blob, manifest.weights)


def test_what_has_no_blocks_or_no_numbers_is_refused(state: BuiltState, tmp_path: Path, model_file: Path) -> None:
    """A folder, an infinite scale and a file that is cut short; nothing is left in the store."""
    with pytest.MonkeyPatch.context() as patch:
        for name in (environment.SNAPSHOT_KEYS, environment.SNAPSHOT_KEY, environment.STATE_DIR):
            patch.delenv(name, raising=False)
        place = ["--name", "tiny", "--state-dir", str(state.state_dir)]
        refused = CliRunner().invoke(main, ["build", str(DATA / "tiny_llama"), "--quantize", "gguf", *place])
    assert refused.exit_code == 1
    assert "this source has none: leave the option out" in refused.output
    poisoned = write_model(tmp_path / "poisoned.gguf", poisoned="blk.1.ffn_gate.weight")
    with pytest.raises(MalformedModelError, match=r"layers\.1\.gate_up\.weight"):
        build(state, poisoned, "tiny", WeightFormat.GGUF)
    poisoned = write_model(tmp_path / "poisoned.gguf", poisoned="blk.1.attn_k.weight")
    with pytest.raises(MalformedModelError, match=r"layers\.1\.qkv\.weight"):
        build(state, poisoned, "tiny", WeightFormat.GGUF)
    with open_gguf(model_file) as source:
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(model_file.read_bytes())
        with open_gguf(cut) as cut_source:
            cut.write_bytes(model_file.read_bytes()[:-5000])
            with pytest.raises(MalformedModelError, match="cut short"):
                build_snapshot(cut_source, "tiny", state.store, state.keyring, weight_format=WeightFormat.GGUF)
        plain = replace(source, tensors=tuple(replace(t, quantised=None) for t in source.tensors))  # type: ignore[type-var]
        with pytest.raises(BuildError, match="has none"):
            build_snapshot(plain, "tiny", state.store, state.keyring, weight_format=WeightFormat.GGUF)
    assert state.store.list_names() == []
