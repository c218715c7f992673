"""A model as a worker holds it after restore: the seam between snapshot, guest and engine."""

from __future__ import annotations

from dataclasses import dataclass

from worker.backends.protocol import ModelPlan
from worker.engine.text import TextModel


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Restored model. The worker's slot loop owns it and closes what is behind it."""

    name: str
    snapshot_id: str
    plan: ModelPlan
    text: TextModel
    eos_token_ids: tuple[int, ...]
