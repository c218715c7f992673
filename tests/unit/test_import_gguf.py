"""GGUF files: every tensor type, the q/k order, rope frequencies, tokenisers, and what is refused how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guests.llama_assets import PreTokenizer, TokenizerKind, TokenKind
from tests.checkpoint_files import (
    DATA,
    FloatArray,
    gguf_metadata,
    gguf_tensors,
    write_gguf,
    write_tiny_gguf,
)
from worker.build.errors import BuildError, MalformedModelError, UnsupportedModelError
from worker.build.gguf_file import SUPPORTED_TYPES, GgufFile
from worker.build.gguf_source import open_gguf
from worker.build.hf_source import open_hugging_face
from worker.build.source import ModelSource


def _read_all(source: ModelSource) -> dict[str, FloatArray]:
    return {tensor.name: tensor.read() for tensor in source.tensors}


def _refusal(path: Path) -> BuildError:
    with pytest.raises(BuildError) as caught, open_gguf(path):
        pass
    assert str(path) in str(caught.value)
    return caught.value


@pytest.mark.parametrize("kind", SUPPORTED_TYPES)
def test_every_tensor_type_reads_as_the_gguf_package_reads_it(tmp_path: Path, kind: str) -> None:
    """Rows of any supported type, read in pieces, equal the package's dequantisation of the whole."""
    tensor_type = GGMLQuantizationType[kind]
    block_size, block_bytes = GGML_QUANT_SIZES[tensor_type]
    rows, columns = 5, 2 * block_size
    raw = np.random.default_rng(1).integers(0, 256, (rows, columns // block_size * block_bytes), dtype=np.uint8)
    raw[:, 1::2] &= 0x3F  # no exponent of all ones: half-precision scales stay finite
    raw[:, ::2] &= 0x3F
    path = tmp_path / "one.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("weight", raw, raw_dtype=tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = dequantize(np.asarray(GGUFReader(path).tensors[0].data), tensor_type).reshape(rows, columns)
    with GgufFile(path) as file:
        assert file.shape("weight") == (rows, columns)
        pieces = [file.read_rows("weight", start, start + 1) for start in range(rows)]
    np.testing.assert_array_equal(np.concatenate(pieces), expected)
    assert np.isfinite(expected).all()


@pytest.mark.parametrize(
    ("name", "architecture"), [("tiny_llama", "llama"), ("tiny_qwen2", "qwen2"), ("tiny_qwen3", "qwen3")]
)
def test_gguf_and_hugging_face_imports_agree(tmp_path: Path, name: str, architecture: str) -> None:
    """The same model in both formats gives the same canonical tensors: q and k of llama are un-permuted."""
    path = write_tiny_gguf(tmp_path / "model.gguf", name, architecture)
    with open_gguf(path) as from_gguf, open_hugging_face(DATA / name) as from_folder:
        ours, theirs = _read_all(from_gguf), _read_all(from_folder)
        assert list(ours) == list(theirs)
        assert from_gguf.tokenizer == from_folder.tokenizer
        assert from_gguf.special_texts == from_folder.special_texts
    for tensor, values in theirs.items():
        if tensor != "rope.inv_freq":  # scaled in the folder, plain in this file
            np.testing.assert_array_equal(ours[tensor], values, err_msg=tensor)


def test_rope_frequency_factors_divide_the_frequencies(tmp_path: Path) -> None:
    """``rope_freqs.weight``, which converters write for Llama 3, gives the scaled frequencies of the folder."""
    with open_hugging_face(DATA / "tiny_llama") as folder:
        expected = _read_all(folder)["rope.inv_freq"]
    metadata = gguf_metadata("tiny_llama", "llama")
    plain = 1.0 / np.float32(500.0) ** (np.arange(0, 12, 2, dtype=np.float32) / 12)
    tensors = gguf_tensors("tiny_llama", interleaved=True)
    tensors["rope_freqs.weight"] = (plain / expected).astype(np.float32)
    assert (tensors["rope_freqs.weight"] > 1).any()
    with open_gguf(write_gguf(tmp_path / "model.gguf", metadata, tensors)) as source:
        np.testing.assert_allclose(_read_all(source)["rope.inv_freq"], expected, rtol=1e-6)


def test_linear_rope_scaling_stretches_positions(tmp_path: Path) -> None:
    """Linear scaling by 4 divides every frequency by 4."""
    plain = write_tiny_gguf(tmp_path / "plain.gguf")
    changes = {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0}
    scaled = write_tiny_gguf(tmp_path / "scaled.gguf", **changes)
    with open_gguf(plain) as one, open_gguf(scaled) as other:
        np.testing.assert_allclose(_read_all(other)["rope.inv_freq"] * 4, _read_all(one)["rope.inv_freq"])


def test_quantised_matrices_come_back_near_their_values(tmp_path: Path) -> None:
    """A file with Q8_0 matrices imports to within a quantisation step, also through the q/k un-permutation."""
    metadata = gguf_metadata("tiny_llama", "llama")
    for key, value in {"embedding_length": 64, "feed_forward_length": 96, "attention.key_length": 16}.items():
        metadata[f"llama.{key}"] = value
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.normal(0, 1, tuple(_widen(name, size) for size in values.shape)).astype(np.float32)
        for name, values in gguf_tensors("tiny_llama", interleaved=True).items()
    }
    matrices = {name: GGMLQuantizationType.Q8_0 for name, values in tensors.items() if values.ndim == 2}
    exact = write_gguf(tmp_path / "f32.gguf", metadata, tensors)
    coarse = write_gguf(tmp_path / "q8.gguf", metadata, tensors, matrices)
    with open_gguf(exact) as one, open_gguf(coarse) as other:
        reference, quantised = _read_all(one), _read_all(other)
    for name, values in reference.items():
        np.testing.assert_allclose(quantised[name], values, atol=0.03, err_msg=name)


def _widen(name: str, size: int) -> int:
    return {48: 64, 24: 32, 80: 96}.get(size, size)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"llama__expert_count": 8}, ["8 experts", "dense"]),
        ({"llama__rope__dimension_count": 6}, ["rope.dimension_count", "12"]),
        ({"llama__rope__scaling__type": "longrope"}, ["longrope", "yarn"]),
        ({"tokenizer__ggml__model": "bert"}, ["'bert'", "gpt2", "llama"]),
        ({"tokenizer__ggml__pre": "tekken"}, ["'tekken'", "smollm", "llama-bpe", "qwen2"]),
        ({"tokenizer__ggml__pre": None}, ["'default'", "tokenizer.ggml.pre"]),
    ],
)
def test_unsupported_models_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    """The message names what the model needs and lists what is supported."""
    error = _refusal(write_tiny_gguf(tmp_path / "model.gguf", **changes))
    assert isinstance(error, UnsupportedModelError)
    assert all(word in str(error) for word in words)


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    """The first thing judged is the architecture."""
    error = _refusal(write_tiny_gguf(tmp_path / "model.gguf", architecture="mamba"))
    assert isinstance(error, UnsupportedModelError)
    assert "'mamba'" in str(error)
    assert "llama, qwen2, qwen3" in str(error)


def test_an_unsupported_tensor_type_is_refused_by_name(tmp_path: Path) -> None:
    """A type that the importers do not read is named with its tensor."""
    path = tmp_path / "model.gguf"
    tensors = gguf_tensors("tiny_llama", interleaved=True)
    types = {"output_norm.weight": GGMLQuantizationType.TQ1_0}
    tensors["output_norm.weight"] = np.zeros(256, np.float32)
    error = _refusal(write_gguf(path, gguf_metadata("tiny_llama", "llama"), tensors, types))
    assert isinstance(error, UnsupportedModelError)
    assert "output_norm.weight has type TQ1_0" in str(error)
    assert "Q4_K" in str(error)


def test_tensors_of_another_model_are_refused(tmp_path: Path) -> None:
    """A tensor that would not be used means that the model computes something else."""
    tensors = gguf_tensors("tiny_llama", interleaved=True)
    tensors["blk.0.attn_sub_norm.weight"] = np.ones(48, np.float32)
    error = _refusal(write_gguf(tmp_path / "model.gguf", gguf_metadata("tiny_llama", "llama"), tensors))
    assert isinstance(error, UnsupportedModelError)
    assert "blk.0.attn_sub_norm.weight" in str(error)


def test_a_missing_or_misshapen_tensor_is_named(tmp_path: Path) -> None:
    """Shapes are compared with the configuration before anything is read."""
    tensors = gguf_tensors("tiny_llama", interleaved=True)
    metadata = gguf_metadata("tiny_llama", "llama")
    kept = {name: values for name, values in tensors.items() if name != "blk.1.ffn_up.weight"}
    assert "blk.1.ffn_up.weight is missing" in str(_refusal(write_gguf(tmp_path / "a.gguf", metadata, kept)))
    tensors["blk.1.ffn_up.weight"] = tensors["blk.1.ffn_up.weight"][:-1]
    message = str(_refusal(write_gguf(tmp_path / "b.gguf", metadata, tensors)))
    assert "(79, 48)" in message
    assert "(80, 48)" in message


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    """Truncation at any length is our own error, never an index error or a partial model."""
    whole = write_tiny_gguf(tmp_path / "model.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 400, 7), *range(400, len(whole) - 1, len(whole) // 60), len(whole) - 40]:
        cut.write_bytes(whole[:length])
        assert isinstance(_refusal(cut), MalformedModelError)


@pytest.mark.parametrize("offset", [8, 16])
def test_absurd_counts_cost_nothing(tmp_path: Path, offset: int) -> None:
    """A header that promises 2^60 tensors or entries is refused by the number."""
    data = bytearray(write_tiny_gguf(tmp_path / "model.gguf").read_bytes())
    data[offset : offset + 8] = (1 << 60).to_bytes(8, "little")
    path = tmp_path / "lying.gguf"
    path.write_bytes(data)
    assert str(1 << 60) in str(_refusal(path))


def test_an_array_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    """Array lengths are compared with what is left of the file before anything is allocated."""
    data = bytearray(write_tiny_gguf(tmp_path / "model.gguf").read_bytes())
    key = b"tokenizer.ggml.tokens"
    position = data.index(key) + len(key) + 8  # value type and element type
    data[position : position + 8] = (1 << 40).to_bytes(8, "little")
    path = tmp_path / "lying.gguf"
    path.write_bytes(data)
    assert "tokenizer.ggml.tokens states" in str(_refusal(path))


@pytest.fixture(scope="module")
def tiny_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf").read_bytes()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 9000), value=st.integers(0, 255))
def test_a_changed_header_byte_is_refused_or_harmless(
    tmp_path: Path, tiny_bytes: bytes, position: int, value: int
) -> None:
    """Whatever one byte of the header becomes, the importer gives a model or its own error."""
    data = bytearray(tiny_bytes)
    data[position] = value
    path = tmp_path / "flipped.gguf"
    path.write_bytes(data)
    try:
        with open_gguf(path) as source:
            _read_all(source)
    except BuildError:
        pass


def test_byte_level_tokens_are_real_bytes(tmp_path: Path) -> None:
    """Tokens leave GPT-2's printable alphabet, merges become ids, and vocabulary padding is unused."""
    with open_gguf(write_tiny_gguf(tmp_path / "model.gguf")) as source:
        spec = source.tokenizer
    assert spec.kind is TokenizerKind.BYTE_LEVEL_BPE
    assert spec.pre_tokenizer is PreTokenizer.GPT2
    assert sorted(spec.tokens[:256]) == [bytes([value]) for value in range(256)]
    assert spec.tokens[256] == b"<|im_start|>"
    assert spec.kinds[256] is TokenKind.CONTROL
    merged = [spec.tokens[left] + spec.tokens[right] for left, right in spec.merges]
    assert merged == [b"he", b"ll", b"hell"]
    assert len(spec.tokens) == 288
    assert set(spec.kinds[263:]) == {TokenKind.UNUSED}
    assert spec.eos_ids == [257, 258]  # the named one first, then <|endoftext|>


def test_llama3_defaults_come_with_its_pre_tokeniser(tmp_path: Path) -> None:
    """``llama-bpe`` means whole-piece tokens first and a BOS on prompts, as in llama.cpp."""
    with open_gguf(write_tiny_gguf(tmp_path / "model.gguf", tokenizer__ggml__pre="llama-bpe")) as source:
        assert source.tokenizer.pre_tokenizer is PreTokenizer.LLAMA3
        assert source.tokenizer.ignore_merges
        assert source.tokenizer.add_bos


def test_sentencepiece_vocabulary(tmp_path: Path) -> None:
    """Pieces keep U+2581, byte tokens become bytes, scores and defaults of Llama 2 are taken over."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), "▁", "a", "▁a"]
    changes = {
        "tokenizer__ggml__model": "llama",
        "tokenizer__ggml__pre": None,
        "tokenizer__ggml__merges": None,
        "tokenizer__ggml__tokens": pieces,
        "tokenizer__ggml__token_type": [2, 3, 3, *([6] * 256), 1, 1, 1],
        "tokenizer__ggml__scores": [0.0] * 259 + [-1.0, -2.0, -3.0],
        "tokenizer__ggml__bos_token_id": 1,
        "tokenizer__ggml__eos_token_id": 2,
    }
    with open_gguf(write_tiny_gguf(tmp_path / "model.gguf", **changes)) as source:
        spec = source.tokenizer
        assert source.special_texts.eos_token == "</s>"
    assert spec.kind is TokenizerKind.SENTENCEPIECE_BPE
    assert spec.tokens[3 + 0x0A] == b"\n"
    assert spec.tokens[261] == "▁a".encode()
    assert spec.scores[261] == -3.0
    assert spec.eos_ids == [2]
    assert spec.add_bos
    assert spec.add_space_prefix
    assert spec.unk_id == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer__ggml__eos_token_id": 9999},
        {"tokenizer__ggml__bos_token_id": 9999},
        {"tokenizer__ggml__token_type": [1, 1]},
        {"tokenizer__ggml__merges": ["nospace"]},
        {"tokenizer__ggml__tokens": "text"},
        {"llama__attention__head_count": 0},
        {"llama__attention__head_count_kv": 3},
        {"llama__block_count": 0},
        {"llama__context_length": 0},
    ],
)
def test_contradictions_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Ids out of range, lists of unequal length and impossible sizes are malformed, not crashes."""
    assert isinstance(_refusal(write_tiny_gguf(tmp_path / "model.gguf", **changes)), MalformedModelError)
