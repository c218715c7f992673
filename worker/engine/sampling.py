"""What the sampling of one choice depends on, put into rows that a backend draws from.

The order of the transformations is in :class:`worker.backends.sampling_rows.SamplingRow`. Log-probabilities are taken
from the logits before all of them.

**What a seed guarantees.** Token ``i`` of choice ``c`` draws exactly one uniform number, which depends on
``(seed, c, i)`` only (Philox 4x64, keyed by seed and choice, counter ``i``): not on the batch, not on time, not on
whether the run was resumed or its tokens were guessed ahead. A row of logits is drawn from without regard to any
other. So equal logits give the equal token, bit for bit, on every backend.

Logits themselves may differ in their last bits between batch shapes, because matrix products sum in another order
(most where activations are rounded to bf16: 0.03 was seen). The draw is inverse-CDF, so such a difference changes a
token only where the drawn number falls into that sliver of probability, and a greedy token only where the two best
logits are that close.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from scheduler.contract.messages import SamplingParams
from worker.backends.sampling_rows import NO_IDS, NO_VALUES, SamplingRow

_UINT64_MASK: Final = (1 << 64) - 1
_UNIT_53_BITS: Final = 2.0**-53
_RAWS_PER_COUNT: Final = 4  # Philox 4x64 makes four numbers of one counter value
_DRAWN_AHEAD: Final = 32  # positions


class SamplingError(Exception):
    """No token can be chosen from the logits; the message says why."""


class PositionalRandom:
    """Uniform numbers in [0, 1) addressed by position. Draws some positions ahead: 0.4 us a number."""

    def __init__(self, seed: int, choice: int) -> None:
        self._generator = np.random.Philox(0)
        self._counter = np.zeros(4, np.uint64)
        self._state: Any = {
            **self._generator.state,
            "state": {"counter": self._counter, "key": np.array([seed & _UINT64_MASK, choice], np.uint64)},
        }
        self._first = 0
        self._drawn: list[float] = []  # of positions from `_first` on

    def draw(self, position: int) -> float:
        """The number at ``position``: 53 random bits."""
        index = position - self._first
        if not 0 <= index < len(self._drawn):
            self._draw_from(position)
            index = 0
        return self._drawn[index]

    def _draw_from(self, position: int) -> None:
        self._counter[0] = position
        self._generator.state = self._state
        raws = self._generator.random_raw(_RAWS_PER_COUNT * _DRAWN_AHEAD)[::_RAWS_PER_COUNT]
        self._first = position
        self._drawn = ((raws >> np.uint64(11)) * _UNIT_53_BITS).tolist()


class Sampler:
    """The sampling state of one choice of one request: what it generated so far, and its parameters.

    ``eos_token_ids`` are suppressed while fewer than ``min_tokens`` tokens were generated, or always with
    ``ignore_eos``. Engine thread only.
    """

    def __init__(
        self,
        params: SamplingParams,
        choice: int,
        *,
        prompt_token_ids: tuple[int, ...],
        eos_token_ids: tuple[int, ...],
        vocab_size: int,
    ) -> None:
        self._params = params
        self._random = PositionalRandom(params.seed, choice)
        self._counts: dict[int, int] = {}
        self._seen: set[int] = set(prompt_token_ids) if params.repetition_penalty != 1 else set()
        self._penalises_counts = params.frequency_penalty != 0 or params.presence_penalty != 0
        self._is_penalised = params.repetition_penalty != 1 or self._penalises_counts
        self._num_generated = 0
        self._bias = _sort_bias(params.logit_bias)
        suppressed = dict.fromkeys((token for token in eos_token_ids if token < vocab_size), -np.inf)
        self._bias_without_eos = _sort_bias({**params.logit_bias, **suppressed})

    def make_row(
        self, row: int, *, allowed: npt.NDArray[np.uint32] | None = None, after: Sequence[int] = ()
    ) -> SamplingRow:
        """How the token behind all accepted ones, and behind the guessed ones in ``after``, is drawn from ``row`` of
        the logits. Accepts nothing: see :meth:`accept`. ``allowed`` is the grammar's mask for that position."""
        params = self._params
        position = self._num_generated + len(after)
        suppresses_eos = params.ignore_eos or position < params.min_tokens
        bias_ids, bias_values = self._bias_without_eos if suppresses_eos else self._bias
        seen, counted, counts = self._describe_history(after) if self._is_penalised else (NO_IDS, NO_IDS, NO_VALUES)
        return SamplingRow(
            row,
            0.0 if params.temperature <= 0 else self._random.draw(position),
            params.temperature,
            params.top_k,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            seen,
            params.frequency_penalty,
            params.presence_penalty,
            counted,
            counts,
            bias_ids,
            bias_values,
            allowed,
            params.num_top_logprobs,
        )

    def accept(self, token_id: int) -> None:
        """Count ``token_id`` as generated: sampled now, or replayed from an earlier run."""
        self._num_generated += 1
        if self._is_penalised:
            self._counts[token_id] = self._counts.get(token_id, 0) + 1

    def _describe_history(
        self, after: Sequence[int]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Tokens seen, tokens generated and how often, with ``after`` taken as generated."""
        counts = self._counts
        if after:
            counts = dict(counts)
            for token_id in after:
                counts[token_id] = counts.get(token_id, 0) + 1
        seen = NO_IDS
        if self._params.repetition_penalty != 1:
            seen = np.array(sorted(self._seen.union(counts)), np.int64)
        if not self._penalises_counts:
            return seen, NO_IDS, NO_VALUES
        ids = np.array(sorted(counts), np.int64)
        return seen, ids, np.array([counts[token_id] for token_id in sorted(counts)], np.float32)


def _sort_bias(bias: dict[int, float]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    if not bias:
        return NO_IDS, NO_VALUES
    ids = sorted(bias)
    return np.array(ids, np.int64), np.array([bias[token_id] for token_id in ids], np.float32)
