"""``python -m loadtest.random_checkpoint FOLDER --shape 8b``: a Llama checkpoint of a known shape with random weights.

Shaped like Llama 3.2 1B or Llama 3 8B, with a small tokeniser; it says nonsense. Weights repeat one random block, so
that writing is as fast as the disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np

TOKENIZER: Final = Path(__file__).resolve().parent.parent / "tests" / "data" / "tiny_llama"
#: hidden, layers, heads, kv heads, head size, MLP width.
SHAPES: Final = {
    "tiny": (64, 2, 2, 1, 64, 128),
    "1b": (2048, 16, 32, 8, 64, 8192),
    "8b": (4096, 32, 32, 8, 128, 14336),
}
_BLOCK_VALUES: Final = 1 << 22
VOCAB_SIZE: Final = 128_256


def shapes_of(shape: str, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, in order of use."""
    hidden, layers, heads, kv_heads, head_dim, width = SHAPES[shape]
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (heads * head_dim, hidden),
        "self_attn.k_proj": (kv_heads * head_dim, hidden),
        "self_attn.v_proj": (kv_heads * head_dim, hidden),
        "self_attn.o_proj": (hidden, heads * head_dim),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (width, hidden),
        "mlp.up_proj": (width, hidden),
        "mlp.down_proj": (hidden, width),
    }
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab_size, hidden)}
    for index in range(layers):
        found |= {f"model.layers.{index}.{name}.weight": dims for name, dims in layer.items()}
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab_size, hidden)}


def make_config(shape: str, vocab_size: int) -> dict[str, Any]:
    """config.json."""
    hidden, layers, heads, kv_heads, head_dim, width = SHAPES[shape]
    config: dict[str, Any] = json.loads((TOKENIZER / "config.json").read_text())
    return config | {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "vocab_size": vocab_size,
        "tie_word_embeddings": False,
        "max_position_embeddings": 8192,
    }


def write_checkpoint(folder: Path, shape: str, vocab_size: int = VOCAB_SIZE) -> int:
    """Write config, tokeniser and one safetensors file of bf16; bytes of the weights. Blocks."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    (folder / "config.json").write_text(json.dumps(make_config(shape, vocab_size)))
    shapes, header, position = shapes_of(shape, vocab_size), {}, 0
    for name, dims in shapes.items():
        end = position + 2 * int(np.prod(dims))
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": (position, end)}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = np.random.default_rng(1).standard_normal(_BLOCK_VALUES, np.float32)
    ones = np.ones(1 << 16, ml_dtypes.bfloat16).view(np.uint8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for dims in shapes.values():
            scaled = ones if len(dims) == 1 else _scale(block, dims[-1])
            left = 2 * int(np.prod(dims))
            while left:
                left -= file.write(scaled[: min(left, len(scaled))].data)
    return position


def _scale(block: np.ndarray[Any, Any], width: int) -> np.ndarray[Any, Any]:
    return (block * np.float32(width**-0.5)).astype(ml_dtypes.bfloat16).view(np.uint8)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--vocab", type=int, default=VOCAB_SIZE)
    options = parser.parse_args()
    print(f"{write_checkpoint(options.folder, options.shape, options.vocab) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
