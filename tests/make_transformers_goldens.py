"""Make the tiny random models in ``tests/data`` and the logits that ``transformers`` computes for them.

Not run by the tests. Needs torch and transformers, which are no dependencies of this project:

    python3 -m venv /tmp/goldens && /tmp/goldens/bin/pip install torch==2.13.0 transformers==5.23.0
    /tmp/goldens/bin/python tests/make_transformers_goldens.py

Each folder is a complete Hugging Face checkpoint (bfloat16, so that importing it loses nothing) and a
``golden.safetensors`` with ``input_ids`` [T] and ``logits`` [T, V], computed in float32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

DATA = Path(__file__).resolve().parent / "data"
NUM_TOKENS = 40
VOCAB_SIZE = 288
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": None,
}  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_models() -> dict[str, PreTrainedModel]:
    llama3 = {
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    }  # fmt: skip
    yarn = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    linear = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0}
    plain = {"rope_type": "default", "rope_theta": 10_000.0}
    return {
        "tiny_llama": LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=llama3, tie_word_embeddings=False)),
        "tiny_qwen2": Qwen2ForCausalLM(Qwen2Config(**SHAPE, rope_parameters=yarn, tie_word_embeddings=True)),
        "tiny_qwen3": Qwen3ForCausalLM(
            Qwen3Config(**SHAPE, head_dim=16, rope_parameters=plain, tie_word_embeddings=True)
        ),
        "tiny_mistral": MistralForCausalLM(
            MistralConfig(**SHAPE, rope_parameters=linear, sliding_window=8, tie_word_embeddings=False)
        ),
    }


def randomise(model: PreTrainedModel, seed: int) -> None:
    """Weights large enough that every part of the model shows in the logits, rounded to bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            value = 1 + 0.3 * noise if "norm" in name else 0.2 * noise if weight.ndim == 2 else 0.5 * noise
            weight.copy_(value.bfloat16().float())


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE of 256 bytes, four special tokens and a few merges; ids 263 to 287 have no token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)}
    merges = [("h", "e"), ("l", "l"), ("he", "ll")]
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|pad|>"]
    for index, (left, right) in enumerate(merges):
        vocab[left + right] = 260 + index
    tokenizer = Tokenizer(models.BPE(vocab={**vocab, **{t: 256 + i for i, t in enumerate(special)}}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    return tokenizer


def main() -> None:
    for seed, (name, model) in enumerate(make_models().items()):
        folder = DATA / name
        folder.mkdir(parents=True, exist_ok=True)
        randomise(model, seed)
        model.eval()
        input_ids = torch.randint(0, 256, (NUM_TOKENS,), generator=torch.Generator().manual_seed(100 + seed))
        with torch.no_grad():
            logits = model(input_ids[None]).logits[0].float()
        save_file({"input_ids": input_ids, "logits": logits.contiguous()}, folder / "golden.safetensors")
        model.bfloat16().save_pretrained(folder, safe_serialization=True)
        make_tokenizer().save(str(folder / "tokenizer.json"))
        settings = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": CHAT_TEMPLATE}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
        print(name, float(logits.abs().max()), float(logits.std()))


if __name__ == "__main__":
    main()
