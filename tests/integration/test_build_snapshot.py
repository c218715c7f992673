"""Builds through the real guest and store: the same logits as transformers, signed, verified, all or nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from llama_programs import compute_logits
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from guests.llama_assets import CONFIG_ASSET
from guests.runtime import GuestEngine
from snapshots.errors import ManifestMalformed, SnapshotNotFound
from snapshots.manifest import Manifest
from snapshots.mapping import seal_blob
from snapshots.store import SnapshotStore
from snapshots.weights_file import PAGE_BYTES, read_weights_header
from tests.checkpoint_files import DATA, FloatArray, load_checkpoint, write_tiny_gguf
from tests.model_fixtures import BuiltState, new_state
from worker.backends.numpy_reference import NumpyBackend
from worker.backends.protocol import SequenceInput
from worker.build.calibration import Calibration
from worker.build.errors import BuildError, MalformedModelError
from worker.build.model_sources import open_located
from worker.build.quantize import WeightFormat
from worker.build.report import BuildReport
from worker.build.snapshot_builder import build_snapshot
from worker.build.source import ImportedModel, SourceTensor
from worker.model_plan import resolve_handles
from worker.restore import RestoredModel, restore_model

MODELS = ("tiny_llama", "tiny_qwen2", "tiny_qwen3", "tiny_mistral")
PREFILL_TOKENS = 23
TOLERANCE = 2e-4


@pytest.fixture
def state(tmp_path: Path) -> BuiltState:
    return new_state(tmp_path / "state")


@pytest.fixture(scope="module")
def engine() -> Iterator[GuestEngine]:
    with GuestEngine() as engine:
        yield engine


def _build(state: BuiltState, path: Path, weight_format: WeightFormat = WeightFormat.BF16) -> BuildReport:
    with open_located(path) as source:
        return build_snapshot(source, "tiny", state.store, state.keyring, weight_format=weight_format)


def _restore(state: BuiltState, engine: GuestEngine) -> RestoredModel:
    manifest = state.manifest("tiny")
    paths = [(state.store.blob_path(ref), ref) for ref in (manifest.weights, manifest.guest_cwasm)]
    with seal_blob(*paths[0]) as weights, seal_blob(*paths[1]) as guest:
        return restore_model(manifest, weights.fd, guest.fd, engine, seed=1)


def _logits(model: RestoredModel, token_ids: list[int], first: int = PREFILL_TOKENS) -> FloatArray:
    """Logits of positions ``first - 1`` on: one prefill, then a decode step for each token."""
    bound = NumpyBackend().bind(model.loaded.plan)
    bound.open_kv(8)
    table = tuple(range(8))
    rows = [compute_logits(bound, SequenceInput(table, 0, tuple(token_ids[:first])))[0]]
    for position in range(first, len(token_ids)):
        rows.append(compute_logits(bound, SequenceInput(table, position, (token_ids[position],)))[0])
    bound.close()
    return np.stack(rows)


def _tmp_files(state: BuiltState) -> list[Path]:
    return list((state.state_dir / "store" / "tmp").iterdir())


@pytest.mark.parametrize("name", MODELS)
def test_built_models_compute_what_transformers_computes(state: BuiltState, engine: GuestEngine, name: str) -> None:
    """Import, the guest's own programs, restore, reference backend: transformers' logits at every position."""
    golden = load_file(DATA / name / "golden.safetensors")
    _build(state, DATA / name)
    with _restore(state, engine) as model:
        logits = _logits(model, [int(token) for token in golden["input_ids"]])
    np.testing.assert_allclose(logits, golden["logits"][PREFILL_TOKENS - 1 :], atol=TOLERANCE, rtol=0)


def test_a_gguf_build_computes_the_same(state: BuiltState, engine: GuestEngine, tmp_path: Path) -> None:
    """The GGUF form of the tiny Qwen3 has the folder's logits."""
    golden = load_file(DATA / "tiny_qwen3" / "golden.safetensors")
    _build(state, write_tiny_gguf(tmp_path / "model.gguf", "tiny_qwen3", "qwen3"))
    with _restore(state, engine) as model:
        logits = _logits(model, [int(token) for token in golden["input_ids"]])
    np.testing.assert_allclose(logits, golden["logits"][PREFILL_TOKENS - 1 :], atol=TOLERANCE, rtol=0)


def test_int8_stays_near_the_full_weights(state: BuiltState, engine: GuestEngine) -> None:
    """Weight-only int8 per output channel: every matrix has its scales, logits move by a few percent."""
    golden = load_file(DATA / "tiny_llama" / "golden.safetensors")
    report = _build(state, DATA / "tiny_llama", WeightFormat.INT8)
    assert report.weight_format is WeightFormat.INT8
    with _restore(state, engine) as model:
        for tensor in model.loaded.plan.tensors:
            assert (tensor.scale is not None) == (tensor.data.ndim == 2), tensor.name
            assert tensor.data.dtype == (np.int8 if tensor.data.ndim == 2 else np.float32)
        logits = _logits(model, [int(token) for token in golden["input_ids"]])
        del tensor
    error = np.abs(logits - golden["logits"][PREFILL_TOKENS - 1 :])
    assert error.mean() < 0.05 * golden["logits"].std()
    assert state.manifest("tiny").card.weight_format == "int8"


@pytest.mark.parametrize(("weight_format", "share"), [(WeightFormat.FP8, 0.2), (WeightFormat.INT4, 0.4)])
def test_formats_of_gpus_are_stored_with_their_scales(
    state: BuiltState, engine: GuestEngine, tmp_path: Path, weight_format: WeightFormat, share: float
) -> None:
    """fp8 and int4 through build, store and restore: near the full weights, and embeddings never in 4 bits."""
    folder = _write_grouped_model(tmp_path / "model")
    token_ids, logits = list(range(30, 60)), []
    for chosen in (WeightFormat.F32, weight_format):
        _build(state, folder, chosen)
        with _restore(state, engine) as model:
            formats = {tensor.name: str(tensor.data.dtype) for tensor in model.loaded.plan.tensors}
            logits.append(_logits(model, token_ids))
    is_int4 = weight_format is WeightFormat.INT4
    assert formats["layers.0.down.weight"] == ("uint8" if is_int4 else "float8_e4m3fn")
    assert formats["lm_head.weight"] == formats["embed.weight"] == ("int8" if is_int4 else "float8_e4m3fn")
    assert np.abs(logits[1] - logits[0]).mean() < share * logits[0].std()
    assert state.manifest("tiny").card.weight_format == weight_format.value


def _write_grouped_model(folder: Path) -> Path:
    """A checkpoint of one layer whose widths are multiples of 32."""
    shutil.copytree(DATA / "tiny_llama", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_hidden_layers": 1}
    config = json.loads((folder / "config.json").read_text()) | sizes | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    rng, vocab = np.random.default_rng(0), config["vocab_size"]
    shapes = {
        "q_proj": (64, 64),
        "k_proj": (32, 64),
        "v_proj": (32, 64),
        "o_proj": (64, 64),
        "gate_proj": (96, 64),
        "up_proj": (96, 64),
        "down_proj": (64, 96),
    }
    groups = {name: "mlp" if name.startswith(("gate", "up", "down")) else "self_attn" for name in shapes}
    tensors = {f"model.layers.0.{groups[name]}.{name}.weight": shape for name, shape in shapes.items()}
    tensors |= {"model.embed_tokens.weight": (vocab, 64), "lm_head.weight": (vocab, 64)}
    weights = {
        name: (rng.standard_normal(shape) * shape[1] ** -0.5).astype(np.float32) for name, shape in tensors.items()
    }
    norms = ("model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm")
    save_file(weights | {f"{name}.weight": np.ones(64, np.float32) for name in norms}, folder / "model.safetensors")
    return folder


def test_scales_that_do_not_fit_are_refused(state: BuiltState, tmp_path: Path) -> None:
    """int4 without its float16 scales, or with groups that the kernels do not read, is no model."""
    _build(state, _write_grouped_model(tmp_path / "model"), WeightFormat.INT4)
    manifest = state.manifest("tiny")
    resolve_handles(manifest)
    for change in ({"dtype": "F32"}, {"shape": (1, 1)}, {"name": "elsewhere"}, {"shape": (64, 6)}):
        tensors = [
            msgspec.structs.replace(entry, **change) if entry.name == "layers.0.down.weight_scale" else entry
            for entry in manifest.tensors
        ]
        with pytest.raises(ManifestMalformed, match="int4 and has no float16 scales"):
            resolve_handles(msgspec.structs.replace(manifest, tensors=tuple(tensors)))


@pytest.mark.parametrize("name", MODELS)
def test_calibrated_int8_stays_near_for_other_texts(state: BuiltState, engine: GuestEngine, name: str) -> None:
    """Every matrix that multiplies is rounded for the text; tokens drawn at random still move by a few percent only."""
    golden = load_file(DATA / name / "golden.safetensors")
    token_ids = [int(token) for token in golden["input_ids"]]
    blobs = []
    for calibration in (None, Calibration.default()):
        with open_located(DATA / name) as source:
            build_snapshot(
                source,
                "tiny",
                state.store,
                state.keyring,
                weight_format=WeightFormat.INT8,
                calibration=calibration,
            )
        with _restore(state, engine) as model:
            logits = _logits(model, token_ids)
        blobs.append(load_file(state.store.blob_path(state.manifest("tiny").weights)))
    expected = golden["logits"][PREFILL_TOKENS - 1 :]
    assert np.abs(logits - expected).mean() < 0.05 * expected.std()
    plain, calibrated = blobs
    assert plain.keys() == calibrated.keys()
    for tensor_name, data in plain.items():
        is_rounded = data.dtype == np.int8 and (tensor_name != "embed.weight" or "lm_head.weight" not in plain)
        assert np.array_equal(data, calibrated[tensor_name]) != is_rounded, tensor_name


def test_too_little_text_is_refused_only_where_it_was_asked_for(state: BuiltState) -> None:
    """A text of a few tokens cannot calibrate: an error for the user's own, plain rounding for the default."""
    with open_located(DATA / "tiny_llama") as source:
        with pytest.raises(BuildError, match=r"cannot calibrate: the text has [0-9] tokens"):
            build_snapshot(
                source,
                "tiny",
                state.store,
                state.keyring,
                weight_format=WeightFormat.INT8,
                calibration=Calibration("Hello"),
            )
        build_snapshot(
            source,
            "tiny",
            state.store,
            state.keyring,
            weight_format=WeightFormat.INT8,
            calibration=Calibration("Hello", is_explicit=False),
        )


def test_f32_keeps_every_bit(state: BuiltState, engine: GuestEngine) -> None:
    """``--dtype f32`` stores matrices as float32."""
    _build(state, DATA / "tiny_llama", WeightFormat.F32)
    with _restore(state, engine) as model:
        assert {str(tensor.data.dtype) for tensor in model.loaded.plan.tensors} == {"float32"}


def test_the_manifest_tells_what_was_built(state: BuiltState) -> None:
    """Card, tensors in order of use on page boundaries, handles that all exist, blobs that verify."""
    report = _build(state, DATA / "tiny_qwen2")
    manifest = state.manifest("tiny")
    assert manifest.snapshot_id == report.snapshot_id
    assert state.store.verify("tiny", state.keyring) == []
    card = manifest.card
    assert (card.architecture, card.weight_format, card.context_length) == ("qwen2", "bf16", 128)
    assert (card.num_layers, card.num_kv_heads, card.head_dim, card.vocab_size) == (2, 2, 12, 288)
    assert card.eos_token_ids == (257, 258)
    assert (card.bos_token, card.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert card.max_token_bytes == len("<|endoftext|>")
    assert card.chat_template is not None
    assert card.worker_bytes > 8 * 128 * 2 * 2 * 2 * 12 * 4
    names = [tensor.name for tensor in manifest.tensors]
    assert names[:3] == ["rope.inv_freq", "embed.weight", "layers.0.attn_norm.weight"]
    assert names[-1] == "norm.weight"
    assert all(tensor.offset % PAGE_BYTES == 0 for tensor in manifest.tensors)
    assert set(manifest.tensor_handles) == set(names)


def test_the_weights_blob_is_a_plain_safetensors_file(state: BuiltState) -> None:
    """Others' readers open it; its header says what the manifest says."""
    _build(state, DATA / "tiny_llama")
    manifest = state.manifest("tiny")
    path = state.store.blob_path(manifest.weights)
    with path.open("rb") as file:
        assert read_weights_header(file.fileno()) == manifest.tensors
    with safe_open(path, framework="np") as tensors:
        np.testing.assert_array_equal(
            tensors.get_tensor("norm.weight"), load_checkpoint("tiny_llama")["model.norm.weight"]
        )


def test_building_twice_gives_the_same_blobs(state: BuiltState) -> None:
    """A build is a function of its source: blobs are equal, and the second manifest replaces the first."""
    first_id = _build(state, DATA / "tiny_llama").snapshot_id
    first = state.manifest("tiny")
    second_id = _build(state, DATA / "tiny_llama").snapshot_id
    second = state.manifest("tiny")
    assert first.weights == second.weights
    assert first.guest_wasm == second.guest_wasm
    assert replace_times(first) == replace_times(second)
    assert (first_id != second_id) == (first.created_at_s != second.created_at_s)


def replace_times(manifest: Manifest) -> tuple[object, ...]:
    """All of a manifest but when it was made and what the compiler gave."""
    return (manifest.card, manifest.identity, manifest.tensors, manifest.tensor_handles, manifest.programs)


def _with_tensors(change: Callable[[SourceTensor], SourceTensor], state: BuiltState) -> None:
    with open_located(DATA / "tiny_llama") as source:
        assert isinstance(source, ImportedModel)
        changed = replace(source, tensors=tuple(change(tensor) for tensor in source.tensors))
        build_snapshot(changed, "tiny", state.store, state.keyring)


def _assert_nothing_was_made(state: BuiltState) -> None:
    assert state.store.list_names() == []
    assert _tmp_files(state) == []
    with pytest.raises(SnapshotNotFound):
        state.manifest("tiny")


def test_weights_that_are_no_numbers_are_refused(state: BuiltState) -> None:
    """NaN or infinity in a weight names the tensor and leaves nothing behind."""

    def poison(tensor: SourceTensor) -> SourceTensor:
        if tensor.name != "layers.1.down.weight":
            return tensor
        block = np.full(tensor.shape, np.nan, np.float32)
        return SourceTensor(tensor.name, tensor.shape, lambda: iter((block,)))

    with pytest.raises(MalformedModelError, match=r"layers\.1\.down\.weight"):
        _with_tensors(poison, state)
    _assert_nothing_was_made(state)


def test_an_interrupt_in_the_middle_leaves_nothing(state: BuiltState) -> None:
    """Ctrl-C while weights are written: no manifest, no temporary file."""

    def interrupt(tensor: SourceTensor) -> SourceTensor:
        def blocks() -> Iterator[FloatArray]:
            raise KeyboardInterrupt
            yield

        return replace(tensor, row_blocks=blocks) if tensor.name == "norm.weight" else tensor

    with pytest.raises(KeyboardInterrupt):
        _with_tensors(interrupt, state)
    _assert_nothing_was_made(state)


def test_what_the_guest_refuses_is_refused_before_writing(state: BuiltState, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest's reason reaches the user, and the store stays empty."""
    monkeypatch.setattr("worker.build.snapshot_builder.pack_config", lambda config: b"no " + CONFIG_ASSET.encode())
    with pytest.raises(BuildError, match="the guest refuses this model"):
        _build(state, DATA / "tiny_llama")
    _assert_nothing_was_made(state)
    assert list((state.state_dir / "store" / "blobs").iterdir()) == []


STUCK_BUILD = """
import sys
from dataclasses import replace
from pathlib import Path
from snapshots.keyring import KeyRing
from snapshots.store import SnapshotStore
from worker.build.model_sources import open_located
from worker.build.snapshot_builder import build_snapshot

state, folder = Path(sys.argv[1]), Path(sys.argv[2])

def stick(tensor):
    def blocks():
        print("writing", flush=True)
        sys.stdin.read()
    return replace(tensor, row_blocks=blocks) if tensor.name == "norm.weight" else tensor

with open_located(folder) as source:
    source = replace(source, tensors=tuple(stick(tensor) for tensor in source.tensors))
    keyring = KeyRing.from_file(state / "keys" / "snapshot.keys")
    build_snapshot(source, "tiny", SnapshotStore(state / "store"), keyring)
"""


def test_a_killed_build_leaves_nothing_half_made(state: BuiltState) -> None:
    """kill -9 while weights are written: no snapshot; the leftover is swept; the next build succeeds."""
    command = [sys.executable, "-c", STUCK_BUILD, str(state.state_dir), str(DATA / "tiny_llama")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        assert len(_tmp_files(state)) == 1
        SnapshotStore(state.state_dir / "store", tmp_stale_after_s=0)
        assert len(_tmp_files(state)) == 1, "a living build's file must not be swept"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert state.store.list_names() == []
    SnapshotStore(state.state_dir / "store", tmp_stale_after_s=0)
    assert _tmp_files(state) == []
    _build(state, DATA / "tiny_llama")
    assert state.store.verify("tiny", state.keyring) == []
