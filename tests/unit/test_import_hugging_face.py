"""Hugging Face folders: configurations, weights in one file or many, and what is refused how."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.checkpoint_files import DATA, copy_folder, edit_json, load_checkpoint, write_safetensors
from worker.build.errors import BuildError, MalformedModelError, UnsupportedModelError
from worker.build.hf_config import decode_config, read_decoder, read_rope
from worker.build.hf_source import open_hugging_face
from worker.build.source import ImportedModel

BASE: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "vocab_size": 288,
}  # fmt: skip


def _config(**changes: Any) -> bytes:
    return json.dumps({**BASE, **changes}).encode()


def _read_all_parts(data: bytes) -> None:
    config = decode_config(data)
    read_decoder(config)
    read_rope(config)


def _refusal(folder: Path) -> BuildError:
    with pytest.raises(BuildError) as caught, open_hugging_face(folder):
        pass
    return caught.value


def _read_all(folder: Path) -> dict[str, bytes]:
    with open_hugging_face(folder) as source:
        return {tensor.name: tensor.read().tobytes() for tensor in source.tensors}


def test_an_index_over_several_files_gives_the_same_model(tmp_path: Path) -> None:
    """Sharded checkpoints read like one file."""
    folder = copy_folder(tmp_path / "model")
    weights = load_checkpoint("tiny_llama")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"a-1.safetensors": names[::2], "a-2.safetensors": names[1::2]}
    for shard, members in shards.items():
        arrays = {name: weights[name].astype(ml_dtypes.bfloat16) for name in members}
        write_safetensors(folder / shard, arrays, "BF16")
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    edit_json(folder / "model.safetensors.index.json", weight_map=weight_map)
    assert _read_all(folder) == _read_all(DATA / "tiny_llama")


@pytest.mark.parametrize(("dtype", "kind"), [("F32", np.float32), ("F16", np.float16)])
def test_other_float_types_are_read(tmp_path: Path, dtype: str, kind: type[np.floating[Any]]) -> None:
    """F32 and F16 checkpoints hold the tiny model's values exactly."""
    folder = copy_folder(tmp_path / "model")
    weights = {name: values.astype(kind) for name, values in load_checkpoint("tiny_llama").items()}
    write_safetensors(folder / "model.safetensors", weights, dtype)
    ours, theirs = _read_all(folder), _read_all(DATA / "tiny_llama")
    for name, data in theirs.items():
        values, expected = np.frombuffer(ours[name], np.float32), np.frombuffer(data, np.float32)
        np.testing.assert_allclose(values, expected, atol=1e-7)


def test_a_tied_model_may_carry_its_head_twice(tmp_path: Path) -> None:
    """Some writers store the tied head as well; it is the same matrix and is left out."""
    folder = copy_folder(tmp_path / "model", "tiny_qwen2")
    weights = load_checkpoint("tiny_qwen2")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    write_safetensors(folder / "model.safetensors", weights)
    with open_hugging_face(folder) as source:
        assert isinstance(source, ImportedModel)
        assert "lm_head.weight" not in [tensor.name for tensor in source.tensors]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (0, 0)),
        ({"sliding_window": 16}, (0, 0)),  # Llama has none, whatever the file says
        ({"model_type": "mistral", "sliding_window": 16}, (16, 0)),
        ({"model_type": "mistral", "sliding_window": None}, (0, 0)),
        ({"model_type": "mistral", "sliding_window": 4096, "max_position_embeddings": 4096}, (0, 0)),
        ({"model_type": "qwen2", "sliding_window": 16}, (0, 0)),
        ({"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": True, "max_window_layers": 3}, (16, 3)),
        (
            {
                "model_type": "qwen2", "sliding_window": 16, "use_sliding_window": True,
                "layer_types": ["full_attention", "full_attention", "sliding_attention", "sliding_attention"],
            },
            (16, 2),
        ),
    ],
)  # fmt: skip
def test_sliding_windows_apply_where_the_model_says_so(changes: dict[str, Any], expected: tuple[int, int]) -> None:
    """Window and first windowed layer, by architecture."""
    decoder = read_decoder(decode_config(_config(**changes)))
    assert (decoder.sliding_window, decoder.sliding_window_from_layer) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"attention_bias": True, "mlp_bias": True}, (True, True, True, False)),
        ({"model_type": "qwen2"}, (True, False, False, False)),
        ({"model_type": "qwen3", "head_dim": 32}, (False, False, False, True)),
        ({"model_type": "mistral"}, (False, False, False, False)),
    ],
)
def test_biases_and_norms_follow_the_architecture(changes: dict[str, Any], expected: tuple[bool, ...]) -> None:
    """QKV bias, output bias, MLP bias and QK norm."""
    decoder = read_decoder(decode_config(_config(**changes)))
    assert (decoder.qkv_bias, decoder.output_bias, decoder.mlp_bias, decoder.qk_norm) == expected


def test_rope_parameters_are_read_in_both_spellings() -> None:
    """``rope_theta`` with ``rope_scaling`` and transformers 5's ``rope_parameters`` mean the same."""
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    old = _config(rope_theta=5e5, rope_scaling={**scaling, "rope_type": "llama3"})
    new = _config(rope_parameters={**scaling, "rope_type": "llama3", "rope_theta": 5e5})
    oldest = _config(rope_theta=5e5, rope_scaling={**scaling, "type": "llama3"})
    rope = read_rope(decode_config(old))
    assert rope == read_rope(decode_config(new)) == read_rope(decode_config(oldest))
    assert (rope.kind, rope.theta, rope.factor) == ("llama3", 5e5, 8.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gemma2"}, ["'gemma2'", "llama", "qwen3"]),
        ({"model_type": "mixtral"}, ["'mixtral'"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequenceClassification"]),
        ({"hidden_act": "gelu"}, ["'gelu'", "silu"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["'gptq'", "GGUF"]),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, ["'longrope'", "llama3", "yarn"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        (
            {
                "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            ["alternate"],
        ),
    ],
)  # fmt: skip
def test_unsupported_configurations_are_refused_by_name(changes: dict[str, Any], words: list[str]) -> None:
    """The message names what the model needs and what there is."""
    with pytest.raises(UnsupportedModelError) as caught:
        _read_all_parts(_config(**changes))
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "big"},
        {"num_attention_heads": 0},
        {"num_hidden_layers": -1},
        {"num_key_value_heads": 3},
        {"head_dim": 7},
        {"vocab_size": 1 << 40},
        {"rope_parameters": {"rope_type": "linear", "factor": "x"}},
        {"rope_parameters": {"partial_rotary_factor": "half"}},
    ],
)
def test_impossible_configurations_are_malformed(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Sizes that make no model are refused before any arithmetic on them."""
    folder = copy_folder(tmp_path / "model")
    edit_json(folder / "config.json", **changes)
    assert isinstance(_refusal(folder), MalformedModelError)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    """Each of the three files is required."""
    folder = copy_folder(tmp_path / "model")
    (folder / name).unlink()
    message = str(_refusal(folder))
    assert name in message or ".safetensors" in message


@pytest.mark.parametrize("place", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ""])
def test_an_index_cannot_leave_the_folder(tmp_path: Path, place: str) -> None:
    """File names of an index are plain names."""
    folder = copy_folder(tmp_path / "model")
    (tmp_path / "outside.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    edit_json(folder / "model.safetensors.index.json", weight_map={"model.norm.weight": place})
    error = _refusal(folder)
    assert isinstance(error, MalformedModelError)
    assert "inside the folder" in str(error)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_symlink_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    """A link to a file elsewhere is refused, even to a good one."""
    folder = copy_folder(tmp_path / "model")
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    assert "leaves the folder" in str(_refusal(folder))


def test_links_of_the_hugging_face_cache_are_followed(tmp_path: Path) -> None:
    """``snapshots/<revision>`` of the hub's cache links into ``blobs`` beside it, and nowhere else."""
    blobs, revision = tmp_path / "blobs", tmp_path / "snapshots" / "0123abcd"
    blobs.mkdir()
    revision.mkdir(parents=True)
    for path in (DATA / "tiny_llama").iterdir():
        (blobs / path.name).write_bytes(path.read_bytes())
        (revision / path.name).symlink_to(Path("../../blobs") / path.name)
    assert _read_all(revision) == _read_all(DATA / "tiny_llama")


def test_a_symlink_loop_and_a_pipe_are_refused(tmp_path: Path) -> None:
    """Neither hangs nor crashes."""
    folder = copy_folder(tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("tokenizer.json")
    assert isinstance(_refusal(folder), MalformedModelError)
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    assert "not a regular file" in str(_refusal(folder))


@pytest.mark.parametrize("length", [0, 7, 8, 100, 2000, 60_000, 131_600])
def test_truncated_weights_are_refused(tmp_path: Path, length: int) -> None:
    """A safetensors file cut anywhere is our own error."""
    folder = copy_folder(tmp_path / "model")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    assert isinstance(_refusal(folder), MalformedModelError)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "BF16", "shape": [48], "data_offsets": [0, 1 << 40]},
        {"dtype": "BF16", "shape": [48], "data_offsets": [96, 0]},
        {"dtype": "BF16", "shape": [-48], "data_offsets": [0, 96]},
        {"dtype": "BF16", "shape": [1 << 62, 4], "data_offsets": [0, 96]},
        {"dtype": "BF16", "shape": [], "data_offsets": [0, 2]},
        {"dtype": "BF16", "data_offsets": [0, 2]},
    ],
)
def test_lying_headers_are_refused(tmp_path: Path, entry: dict[str, Any]) -> None:
    """Shape, offsets and file size have to agree."""
    folder = copy_folder(tmp_path / "model")
    text = json.dumps({"model.norm.weight": entry}).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4096))
    assert isinstance(_refusal(folder), MalformedModelError)


def test_an_unsupported_tensor_type_is_named(tmp_path: Path) -> None:
    """FP8 checkpoints are refused with the tensor's name."""
    folder = copy_folder(tmp_path / "model")
    text = json.dumps({"model.norm.weight": {"dtype": "F8_E4M3", "shape": [48], "data_offsets": [0, 48]}}).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(48))
    error = _refusal(folder)
    assert isinstance(error, UnsupportedModelError)
    assert "model.norm.weight has type F8_E4M3" in str(error)


def test_chat_templates_come_from_either_place(tmp_path: Path) -> None:
    """``chat_template.jinja`` wins; tokenizer_config.json holds one template or several by name."""
    folder = copy_folder(tmp_path / "model")
    with open_hugging_face(folder) as source:
        assert source.chat_template is not None
        assert source.chat_template.startswith("{% for message in messages %}")
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    edit_json(folder / "tokenizer_config.json", chat_template=templates)
    with open_hugging_face(folder) as source:
        assert source.chat_template == "plain"
    (folder / "chat_template.jinja").write_text("from the file")
    with open_hugging_face(folder) as source:
        assert source.chat_template == "from the file"


def test_every_end_of_turn_id_is_collected(tmp_path: Path) -> None:
    """The tokeniser's EOS first, then generation_config's list, then known texts."""
    folder = copy_folder(tmp_path / "model")
    edit_json(folder / "generation_config.json", eos_token_id=[259, 257])
    edit_json(folder / "tokenizer_config.json", bos_token={"content": "<|im_start|>", "lstrip": False})
    with open_hugging_face(folder) as source:
        assert source.tokenizer.eos_ids == [257, 259, 258]
        assert source.tokenizer.bos_id == 256
        assert source.special_texts.bos_token == "<|im_start|>"
