"""How the next token of a choice is chosen from its logits.

Order of the transformations: repetition, frequency and presence penalties; logit bias; suppressed end tokens;
temperature; top-k; top-p; min-p. Log-probabilities are taken from the logits before all of them.

**What a seed guarantees.** Token ``i`` of choice ``c`` draws exactly one uniform number, which depends on
``(seed, c, i)`` only (Philox 4x64, keyed by seed and choice, counter ``i``): not on the batch, not on time, not on
whether the run was resumed. Equal logits therefore give the equal token. Logits themselves may differ in their last
bits when a backend runs another batch shape; the draw is inverse-CDF over candidates, so such a difference changes
a token only where the drawn number falls into that sliver of probability.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from scheduler.contract.messages import SamplingParams
from worker.backends.protocol import FloatArray

_UINT64_MASK: Final = (1 << 64) - 1
_UNIT_53_BITS: Final = 2.0**-53


class SamplingError(Exception):
    """No token can be chosen from the logits; the message says why."""


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probability of the chosen token and of the best candidates, best first."""

    chosen: float
    top: tuple[tuple[int, float], ...]  # (token id, log-probability)


class PositionalRandom:
    """Uniform numbers in [0, 1) addressed by position."""

    def __init__(self, seed: int, choice: int) -> None:
        self._generator = np.random.Philox(0)
        self._counter = np.zeros(4, np.uint64)
        self._state: Any = {
            **self._generator.state,
            "state": {"counter": self._counter, "key": np.array([seed & _UINT64_MASK, choice], np.uint64)},
        }

    def draw(self, position: int) -> float:
        """The number at ``position``: 53 random bits."""
        self._counter[0] = position
        self._generator.state = self._state
        return (int(self._generator.random_raw()) >> 11) * _UNIT_53_BITS


class Sampler:
    """Chooses the tokens of one choice of one request.

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
        self._eos = np.array([token for token in eos_token_ids if token < vocab_size], np.int64)
        self._random = PositionalRandom(params.seed, choice)
        self._counts: dict[int, int] = {}
        self._prompt_tokens = frozenset(prompt_token_ids) if params.repetition_penalty != 1 else frozenset()
        self._bias_ids = np.array(list(params.logit_bias), np.int64)
        self._bias = np.array(list(params.logit_bias.values()), np.float32)
        self._is_penalised = (
            params.repetition_penalty != 1 or params.frequency_penalty != 0 or params.presence_penalty != 0
        )
        self._num_generated = 0

    def choose(self, logits: FloatArray) -> int:
        """The next token id, from ``logits`` ``[V]`` (not changed). Does not advance: see :meth:`accept`.

        Raises:
            SamplingError: the logits are not numbers, or every token is suppressed.
        """
        scores = self._adjust(logits)
        if self._params.temperature <= 0:
            token = int(scores.argmax())
            self._require_finite(float(scores[token]))
            return token
        return self._draw(scores)

    def accept(self, token_id: int) -> None:
        """Count ``token_id`` as generated: sampled now, or replayed from an earlier run."""
        self._num_generated += 1
        if self._is_penalised:
            self._counts[token_id] = self._counts.get(token_id, 0) + 1

    def _adjust(self, logits: FloatArray) -> FloatArray:
        """Logits after penalties, bias and suppression; ``logits`` itself where nothing changes."""
        suppress = len(self._eos) > 0 and (self._params.ignore_eos or self._num_generated < self._params.min_tokens)
        if not (self._is_penalised or len(self._bias_ids) or suppress):
            return logits
        scores = logits.copy()
        if self._is_penalised:
            self._penalise(scores)
        if len(self._bias_ids):
            scores[self._bias_ids] += self._bias
        if suppress:
            scores[self._eos] = -np.inf
        return scores

    def _penalise(self, scores: FloatArray) -> None:
        params = self._params
        if params.repetition_penalty != 1:
            # Source: Keskar et al. 2019, arXiv:1909.05858, section 4.1; prompt tokens count too.
            seen = np.array(sorted(self._prompt_tokens.union(self._counts)), np.int64)
            values = scores[seen]
            penalty = np.float32(params.repetition_penalty)
            scores[seen] = np.where(values > 0, values / penalty, values * penalty)
        if self._counts and (params.frequency_penalty != 0 or params.presence_penalty != 0):
            ids = np.fromiter(self._counts.keys(), np.int64)
            counts = np.fromiter(self._counts.values(), np.float32)
            scores[ids] -= params.frequency_penalty * counts + np.float32(params.presence_penalty)

    def _draw(self, scores: FloatArray) -> int:
        ids, weights = choose_candidates(scores, self._params)
        cumulative = np.cumsum(weights, dtype=np.float64)
        target = self._random.draw(self._num_generated) * cumulative[-1]
        index = min(int(np.searchsorted(cumulative, target, side="right")), len(weights) - 1)
        return int(index if ids is None else ids[index])

    @staticmethod
    def _require_finite(value: float) -> None:
        if not math.isfinite(value):
            raise SamplingError(f"the best logit is {value}: the model's output is not a distribution")


def choose_candidates(scores: FloatArray, params: SamplingParams) -> tuple[npt.NDArray[np.int64] | None, FloatArray]:
    """Token ids that may be drawn, with unnormalised probabilities; ids None means every token in order.

    Raises:
        SamplingError: the scores are not numbers.
    """
    best = float(scores.max())
    Sampler._require_finite(best)
    ids: npt.NDArray[np.int64] | None = None
    if 0 < params.top_k < len(scores):
        ids = np.sort(np.argpartition(scores, len(scores) - params.top_k)[-params.top_k :])
        scores = scores[ids]
    # Subtracting before dividing keeps a tiny temperature from overflowing.
    weights = np.exp((scores - np.float32(best)) / np.float32(params.temperature))
    if params.top_p < 1:
        kept = choose_nucleus(weights, params.top_p)
        ids, weights = (kept if ids is None else ids[kept]), weights[kept]
    if params.min_p > 0:
        kept = np.flatnonzero(weights >= np.float32(params.min_p) * weights.max())
        ids, weights = (kept if ids is None else ids[kept]), weights[kept]
    return ids, weights


def choose_nucleus(weights: FloatArray, top_p: float) -> npt.NDArray[np.int64]:
    """Indices of the fewest largest ``weights`` that hold at least ``top_p`` of their sum, largest first.

    Only entries above ``(1 - top_p) * sum / len`` are sorted: all that lie below hold less than ``1 - top_p``
    together, so the nucleus is above. Source: Holtzman et al. 2020, arXiv:1904.09751.
    """
    total = float(weights.sum(dtype=np.float64))
    threshold = max(1.0 - top_p, 0.0) * total / len(weights)
    possible = np.flatnonzero(weights >= threshold)
    order = possible[np.argsort(-weights[possible], kind="stable")]
    cumulative = np.cumsum(weights[order], dtype=np.float64)
    num_kept = int(np.searchsorted(cumulative, top_p * total, side="left")) + 1
    return order[:num_kept]


def compute_logprobs(logits: FloatArray, token_id: int, num_top: int) -> Logprobs:
    """Natural-log softmax of ``logits`` ``[V]`` at ``token_id`` and at the ``num_top`` best tokens."""
    best = float(logits.max())
    log_total = best + math.log(float(np.exp(logits - np.float32(best)).sum(dtype=np.float64)))
    if num_top <= 0:
        return Logprobs(float(logits[token_id]) - log_total, ())
    num_top = min(num_top, len(logits))
    candidates = np.argpartition(logits, len(logits) - num_top)[-num_top:]
    ordered = candidates[np.lexsort((candidates, -logits[candidates]))]
    top = tuple((int(token), float(logits[token]) - log_total) for token in ordered)
    return Logprobs(float(logits[token_id]) - log_total, top)
