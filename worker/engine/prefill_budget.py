"""How many prompt tokens a step computes beside decodes, so that running streams keep their pace.

The bound: a step with prompt tokens is to take at most :data:`SLOWDOWN` times a step of the same decodes alone. What
both cost is measured, step by step, on this machine and for this model; nothing is configured. Without decodes nobody
waits for the step, and prompts are computed in the largest portions.
"""

from __future__ import annotations

from typing import Final

from worker.engine.batch import PREFILL_TOKENS_PER_STEP

#: Aimed at, so that nearly all steps stay below 2 times a step without prompt tokens.
SLOWDOWN: Final = 1.7
#: Rows of a step, decodes included, are whole multiples of this: kernels compute whole tiles.
TILE_TOKENS: Final = 16
_UNMEASURED_TOKENS: Final = 48  # of a first step beside decodes, when nothing was measured yet
_WEIGHT: Final = 0.25  # of the newest measurement
_LARGEST_JUMP: Final = 2.0  # a measurement counts as at most this many times the average: a stall is not a cost


class PrefillBudget:
    """Measured step times and the decision made of them. Engine thread only."""

    def __init__(self) -> None:
        self._decode_ns: dict[int, float] = {}  # steps of decodes alone, by their number
        self._token_ns: float | None = None  # what one more prompt token costs
        self._is_marginal = False  # measured beside decodes; else a share of a whole step, which is too much

    def choose_tokens(self, num_decodes: int) -> int:
        """Prompt tokens for a step with ``num_decodes`` decodes."""
        if num_decodes == 0:
            return PREFILL_TOKENS_PER_STEP
        alone_ns = self._estimate_alone_ns(num_decodes)
        wanted = float(_UNMEASURED_TOKENS)
        if alone_ns is not None and self._token_ns:
            wanted = (SLOWDOWN - 1) * alone_ns / self._token_ns
        rows = round((min(wanted, PREFILL_TOKENS_PER_STEP) + num_decodes) / TILE_TOKENS) * TILE_TOKENS
        # At least what fills up the last tile, so that a prompt always gets on.
        return max(rows - num_decodes, TILE_TOKENS - num_decodes % TILE_TOKENS)

    def observe(self, num_decodes: int, num_prompt_tokens: int, elapsed_ns: int) -> None:
        """Take note of a step that took ``elapsed_ns``."""
        if num_prompt_tokens == 0:
            self._decode_ns[num_decodes] = _average(self._decode_ns.get(num_decodes), elapsed_ns)
        elif num_decodes == 0:
            if not self._is_marginal:
                self._token_ns = _average(self._token_ns, elapsed_ns / num_prompt_tokens)
        else:
            alone_ns = self._estimate_alone_ns(num_decodes)
            if alone_ns is not None:
                # At least a tenth of the step: what a tile had room for costs nothing, which says little of the rest.
                extra_ns = max(elapsed_ns - alone_ns, elapsed_ns / 10)
                self._token_ns = _average(self._token_ns, extra_ns / num_prompt_tokens)
                self._is_marginal = True

    def _estimate_alone_ns(self, num_decodes: int) -> float | None:
        if not self._decode_ns:
            return None
        nearest = min(self._decode_ns, key=lambda known: abs(known - num_decodes))
        return self._decode_ns[nearest]


def _average(average: float | None, newest: float) -> float:
    if average is None:
        return newest
    return average + _WEIGHT * (min(newest, _LARGEST_JUMP * average) - average)
