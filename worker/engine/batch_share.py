"""What a step computes of batch requests beside interactive ones, so that their pace holds and the batch gets on.

A step that both share has as many rows (tokens) as keep it within :data:`SLOWDOWN` times a step that interactive
sequences would meet now and then without any batch: the 98th percentile of their steps, which is one with somebody's
prompt where prompts come often enough to matter. But the batch has at least half a tile and what fills up the last one:
kernels compute whole tiles, and all rows share the reading of the weights, so that fewer cost nearly as much. Its rows
are given to batch decodes in turn, then to batch prompts. A step with an interactive prompt has no batch row: its first
token waits for no batch. Steps of batch requests alone are kept short while interactive ones come now and then: each of
those waits for the end of one.

What steps cost is measured as they go (:class:`StepCosts`); nothing is configured.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from typing import Final, TypeVar

from worker.engine.batch import PREFILL_TOKENS_PER_STEP
from worker.engine.prefill_budget import TILE_TOKENS, PrefillBudget
from worker.engine.sequence import Choice, RunningRequest

SLOWDOWN: Final = 1.4
#: Steps beside interactive sequences without anything for the batch, after which it gets a tile of one, in the place of
#: interactive prompts: it never starves.
PATIENCE: Final = 64
#: Steps of a batch alone that are kept short after an interactive sequence ended.
WARY_STEPS: Final = 1_000
WARY_ROWS: Final = 2 * TILE_TOKENS
WARY_PROMPT_TOKENS: Final = 4 * TILE_TOKENS  # where nobody decodes
#: Rows a step may be decided to have, and for which costs are kept.
ROWS: Final[tuple[int, ...]] = (1, 2, 4, 8, 12, *range(TILE_TOKENS, PREFILL_TOKENS_PER_STEP + 1, TILE_TOKENS))
_SLOW_QUANTILE: Final = 0.98
_SLOW_WINDOW: Final = 512  # steps
_LOOK_EVERY: Final = 16  # steps between two looks at that window, and at what was not measured for long
_ALONE_EVERY: Final = 64  # steps without anything of the batch, to know what those cost
_FEWEST_TOKENS: Final = 4  # of a prompt: fewer are not worth a sequence's own costs
_NUDGE: Final = 1.015
_LARGEST_JUMP: Final = 1.25  # of a first measurement, over what the nearest sizes take
_FORGET: Final = 0.999

_T = TypeVar("_T")
Candidate = tuple[RunningRequest, Choice]


class StepCosts:
    """What a step of so many rows takes: the median of each size, followed in small nudges, so that a stall is none."""

    def __init__(self) -> None:
        self._ns: dict[int, float] = {}

    def observe(self, num_rows: int, elapsed_ns: int) -> None:
        """A step of ``num_rows`` took ``elapsed_ns``."""
        size = _size_of(num_rows)
        known = self._ns.get(size)
        if known is None:
            likely_ns = self.estimate_ns(num_rows)
            self._ns[size] = min(float(elapsed_ns), _LARGEST_JUMP * likely_ns) if likely_ns else float(elapsed_ns)
        else:
            self._ns[size] = known * _NUDGE if elapsed_ns > known else known / _NUDGE

    def estimate_ns(self, num_rows: int) -> float:
        """What one of ``num_rows`` takes: measured, or in line with the nearest sizes. 0: nothing was measured."""
        size = _size_of(num_rows)
        if size in self._ns:
            return self._ns[size]
        known = sorted(self._ns)
        place = bisect_left(known, size)
        if place == len(known):
            return self._ns[known[-1]] if known else 0.0
        if place == 0:
            return self._ns[known[0]]
        below, above = known[place - 1], known[place]
        share = (size - below) / (above - below)
        return self._ns[below] + share * (self._ns[above] - self._ns[below])

    def most_rows(self, limit_ns: float, before: int) -> int:
        """The largest size within ``limit_ns``; ``before`` was it the last time, and it grows by one size at most."""
        most = 0
        for size in ROWS:
            if self.estimate_ns(size) > limit_ns:
                break
            most = size
            if size > before:
                break
        return most

    def forget_above(self, num_rows: int) -> None:
        """Believe less in the costs of larger steps, so that they are tried again in the end."""
        for size in self._ns:
            if size > num_rows:
                self._ns[size] *= _FORGET


class BatchShare:
    """The choice, and the measurements it is made of. Engine thread only."""

    def __init__(self, prefill: PrefillBudget) -> None:
        self._prefill = prefill
        self._costs = StepCosts()
        self._most_rows = 0
        self._met_ns: deque[float] = deque(maxlen=_SLOW_WINDOW)  # interactive decodes' steps, as without a batch
        self._slow_ns = 0.0
        self._num_met = self._num_shared = self._num_without = self._num_wary = self._first = 0
        self._prompt_tokens = 0
        self._is_shared = False
        self._num_urgent = 0  # interactive decodes of the step under way

    def choose(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The sequences of the next step, interactive first."""
        urgent = [one for one in candidates if not one[0].service_order[0]]
        batch = [one for one in candidates if one[0].service_order[0]]
        self._prompt_tokens, self._is_shared = PREFILL_TOKENS_PER_STEP, False
        self._num_urgent = sum(choice.num_pending == 1 for _, choice in urgent)
        if not urgent:
            self._be_wary(batch)
            return batch
        self._num_wary = WARY_STEPS
        if not batch:
            return urgent
        self._num_shared += 1
        if self._num_without >= PATIENCE:
            return [one for one in urgent if one[1].num_pending == 1] + self._take(batch, TILE_TOKENS)
        if self._num_urgent < len(urgent) or not self._slow_ns or self._num_shared % _ALONE_EVERY == 0:
            self._num_without += 1
            return urgent
        return urgent + self._take(batch, self._count_rows())

    def choose_prompt_tokens(self, num_decodes: int) -> int:
        """Prompt tokens of the step chosen last, which has ``num_decodes`` decodes."""
        if self._is_shared:
            return self._prompt_tokens
        return min(self._prefill.choose_tokens(num_decodes), self._prompt_tokens)

    def observe(self, num_rows: int, elapsed_ns: int) -> None:
        """The step that was chosen last had ``num_rows`` rows, and took ``elapsed_ns``."""
        self._costs.observe(num_rows, elapsed_ns)
        if not self._num_urgent:
            return
        self._met_ns.append(self._costs.estimate_ns(self._num_urgent) if self._is_shared else float(elapsed_ns))
        self._num_met += 1
        if self._num_met % _LOOK_EVERY == 0 or self._num_met < _LOOK_EVERY:
            ordered = sorted(self._met_ns)
            self._slow_ns = ordered[min(len(ordered) - 1, int(_SLOW_QUANTILE * len(ordered)))]
            self._costs.forget_above(num_rows)

    def _be_wary(self, batch: Sequence[Candidate]) -> None:
        """Bound a step of batch requests alone, if interactive ones are likely to come."""
        if self._num_wary > 0:
            self._num_wary -= 1
            num_decodes = sum(choice.num_pending == 1 for _, choice in batch)
            self._prompt_tokens = max(TILE_TOKENS, WARY_ROWS - num_decodes) if num_decodes else WARY_PROMPT_TOKENS

    def _count_rows(self) -> int:
        """Rows for the batch in a step beside interactive decodes: half a tile and what fills up the last, at least."""
        self._most_rows = self._costs.most_rows(SLOWDOWN * self._slow_ns, self._most_rows)
        fewest = -(-(self._num_urgent + TILE_TOKENS // 2) // TILE_TOKENS) * TILE_TOKENS
        return max(self._most_rows, fewest) - self._num_urgent

    def _take(self, batch: Sequence[Candidate], rows: int) -> list[Candidate]:
        """Batch sequences for ``rows`` rows: decodes in turn, then prompts."""
        decodes = [one for one in batch if one[1].num_pending == 1]
        prompts = [one for one in batch if one[1].num_pending > 1]
        num_decodes = min(rows, len(decodes))
        self._prompt_tokens, self._is_shared, self._num_without = rows - num_decodes, True, 0
        if self._prompt_tokens < _FEWEST_TOKENS:
            prompts, self._prompt_tokens = [], 0
        return self._rotate(decodes, num_decodes) + prompts

    def _rotate(self, sequences: list[_T], count: int) -> list[_T]:
        """``count`` of ``sequences``, others the next time."""
        if not count:
            return []
        begin = self._first % len(sequences)
        self._first = begin + count
        return (sequences[begin:] + sequences[:begin])[:count]


def _size_of(num_rows: int) -> int:
    """The one of :data:`ROWS` that a step of ``num_rows`` counts as."""
    return ROWS[min(len(ROWS) - 1, bisect_left(ROWS, num_rows))]
