"""A model as a worker holds it after restore: the seam between snapshot, guest and engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from worker.backends.encoder_protocol import EncoderPlan
from worker.backends.protocol import ModelPlan
from worker.engine.prefixes import PrefixIndex
from worker.engine.text import TextModel, Tokenizer


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Restored model. The worker's slot loop owns it and closes what is behind it."""

    name: str
    snapshot_id: str
    plan: ModelPlan
    text: TextModel
    eos_token_ids: tuple[int, ...]
    prefixes: PrefixIndex = field(default_factory=PrefixIndex)
    #: Opens another instance of the text side, for a thread of its own. May raise GuestError.
    open_text: Callable[[], TextModel] | None = None


@dataclass(frozen=True, slots=True)
class LoadedEncoder:
    """Restored model that gives vectors. Owned as :class:`LoadedModel`."""

    name: str
    snapshot_id: str
    plan: EncoderPlan
    text: Tokenizer
