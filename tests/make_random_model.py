"""``python tests/make_random_model.py FOLDER [--mib N]``: a Llama checkpoint of any size with random weights.

For measuring what size costs: shaped like a model of its size, with the tiny test model's tokeniser; it says nonsense.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
from pathlib import Path

import ml_dtypes
import numpy as np

TINY = Path(__file__).resolve().parent / "data" / "tiny_llama"
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP = 2048, 16, 4, 128, 5632


def main() -> None:
    """Write config, tokeniser and one safetensors file, layer by layer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mib", type=int, default=1024)
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(TINY / name, options.folder)
    config = json.loads((TINY / "config.json").read_text())
    layer_shapes = {
        "input_layernorm": (HIDDEN,),
        "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
        "post_attention_layernorm": (HIDDEN,),
        "mlp.gate_proj": (MLP, HIDDEN),
        "mlp.up_proj": (MLP, HIDDEN),
        "mlp.down_proj": (HIDDEN, MLP),
    }
    layer_bytes = 2 * sum(int(np.prod(shape)) for shape in layer_shapes.values())
    num_layers = max(1, round(options.mib * 2**20 / layer_bytes))
    config |= {
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": MLP,
        "num_hidden_layers": num_layers,
    }
    (options.folder / "config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], HIDDEN)}
    for layer in range(num_layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in layer_shapes.items()}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (config["vocab_size"], HIDDEN)}
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (position, end)}
        position = end
    text = json.dumps(header).encode()
    generator = np.random.default_rng(1)
    with (options.folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            values = generator.standard_normal(shape, np.float32) * np.float32(0.02)
            file.write(values.astype(ml_dtypes.bfloat16).tobytes())


if __name__ == "__main__":
    main()
