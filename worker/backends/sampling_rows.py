"""What the engine asks of a backend when tokens are chosen: one row of logits, how it is drawn from, what came out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

#: ``SampledToken.token_id`` where no token can be chosen: the logits are not numbers, or every token is excluded.
NO_CHOICE: Final = -1

NO_IDS: Final[npt.NDArray[np.int64]] = np.empty(0, np.int64)
NO_VALUES: Final[npt.NDArray[np.float32]] = np.empty(0, np.float32)


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """How one token is chosen from row ``row`` of the step's logits ``[rows, V]``.

    All state of a sequence that matters is in here, so that a backend keeps none. Transformations in this order:
    repetition penalty over ``seen_ids``; frequency and presence penalty over ``counted_ids``, which occurred
    ``counts`` times; ``bias_values`` added at ``bias_ids`` (-inf excludes); tokens whose bit in ``allowed`` is 0 are
    excluded; temperature; top-k; top-p; min-p. ``uniform`` in [0, 1) is the one random number of the draw.

    Ids within an array are distinct and ascending. Arrays are the engine's and not written by anyone.
    """

    row: int
    uniform: float = 0.0
    temperature: float = 0.0  # 0: the best token, without a draw
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seen_ids: npt.NDArray[np.int64] = field(default_factory=lambda: NO_IDS)
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    counted_ids: npt.NDArray[np.int64] = field(default_factory=lambda: NO_IDS)
    counts: npt.NDArray[np.float32] = field(default_factory=lambda: NO_VALUES)
    bias_ids: npt.NDArray[np.int64] = field(default_factory=lambda: NO_IDS)
    bias_values: npt.NDArray[np.float32] = field(default_factory=lambda: NO_VALUES)
    allowed: npt.NDArray[np.uint32] | None = None  # [ceil(V / 32)], bit i % 32 of word i // 32 is token i; None: all
    num_top_logprobs: int | None = None  # None: no log-probabilities; 0: the chosen token's only


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural-log probability of the chosen token and of the best candidates, best first, ties by token id."""

    chosen: float
    top: tuple[tuple[int, float], ...]  # (token id, log-probability)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """What was chosen for one :class:`SamplingRow`. ``logprobs`` are those of the logits as the model gave them."""

    token_id: int  # NO_CHOICE: none could be chosen
    logprobs: Logprobs | None = None
