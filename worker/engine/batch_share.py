"""How many batch sequences a step computes beside interactive ones, so that streams hardly notice a batch.

While an interactive prompt is computed, none: its first token waits for no batch. Beside interactive decodes as many
batch decodes as keep a step within :data:`SLOWDOWN` times one without them; what that allows is learnt from measured
steps (additive increase, multiplicative decrease). Batch prompts wait for a step without interactive ones, or for one
in :data:`FREE_EVERY` that takes everything, so that a batch gets on under any load.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeVar

from worker.engine.sequence import Choice, RunningRequest

SLOWDOWN: Final = 1.4
FREE_EVERY: Final = 128  # fewer than one step in a hundred
_ALONE_EVERY: Final = 16  # steps without batch rows, to know what those cost
_FIRST_ROWS: Final = 1.0
_FEWEST_ROWS: Final = 0.125  # of a row a step: one in eight steps
_MORE: Final = 0.125
_FEWER: Final = 0.75
_WEIGHT: Final = 0.25  # of the newest measurement

_T = TypeVar("_T")
Candidate = tuple[RunningRequest, Choice]


class BatchShare:
    """The choice, and the measurements it is made of. Engine thread only."""

    def __init__(self) -> None:
        self._alone_ns: dict[int, float] = {}  # steps of interactive decodes alone, by their number
        self._rows = _FIRST_ROWS  # batch rows a step that the time allows; a fraction: not in each step
        self._credit = 0.0
        self._num_shared = 0
        self._first = 0
        self._chosen: tuple[int, int] | None = None  # interactive and batch decodes of the step under way

    def choose(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The sequences of the next step, interactive first."""
        self._chosen = None
        urgent = [one for one in candidates if not one[0].service_order[0]]
        batch = [one for one in candidates if one[0].service_order[0]]
        if not urgent or not batch:
            if urgent and all(choice.num_pending == 1 for _, choice in urgent):
                self._chosen = (len(urgent), 0)
            return list(candidates)
        self._num_shared += 1
        if self._num_shared % FREE_EVERY == 0:
            return list(candidates)
        if any(choice.num_pending > 1 for _, choice in urgent):
            return urgent
        decodes = [one for one in batch if one[1].num_pending == 1]
        rows = 0
        if self._num_shared % _ALONE_EVERY:
            self._credit = min(self._credit + self._rows, max(1.0, self._rows) + 1.0)
            rows = min(int(self._credit), len(decodes))
            self._credit -= rows
        self._chosen = (len(urgent), rows)
        return urgent + self._rotate(decodes, rows)

    def observe(self, elapsed_ns: int) -> None:
        """The step that was chosen last took ``elapsed_ns``."""
        if self._chosen is None:
            return
        num_urgent, rows = self._chosen
        alone_ns = self._alone_ns.get(num_urgent)
        if rows == 0:
            before_ns = float(elapsed_ns) if alone_ns is None else alone_ns
            self._alone_ns[num_urgent] = before_ns + _WEIGHT * (min(elapsed_ns, 2 * before_ns) - before_ns)
        elif alone_ns is not None:
            if elapsed_ns > SLOWDOWN * alone_ns:
                self._rows = max(_FEWEST_ROWS, self._rows * _FEWER)
            elif rows >= int(self._rows):
                self._rows = min(self._rows + _MORE, 64.0)

    def _rotate(self, sequences: list[_T], count: int) -> list[_T]:
        """``count`` of ``sequences``, others the next time."""
        if not count:
            return []
        begin = self._first % len(sequences)
        self._first = begin + count
        return (sequences[begin:] + sequences[:begin])[:count]
