"""Plans of the tiny checkpoints in tests/data, imported as a build imports them, without a guest or a store."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
from llama_programs import build_plan

from worker.backends.protocol import ModelPlan, WeightTensor
from worker.build.model_sources import open_located
from worker.build.source import ImportedModel

DATA = Path(__file__).resolve().parent / "data"


def import_plan(name: str, dtype: str) -> ModelPlan:
    """The model of ``tests/data/NAME`` with matrices stored as ``dtype`` (float32 or bfloat16)."""
    stored = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
    weights = {}
    with open_located(DATA / name) as source:
        assert isinstance(source, ImportedModel)
        for tensor in source.tensors:
            values = np.concatenate(list(tensor.row_blocks()))
            weights[tensor.name] = WeightTensor(tensor.name, values.astype(stored if values.ndim == 2 else np.float32))
        return build_plan(source.config, weights)
