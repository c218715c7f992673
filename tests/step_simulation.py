"""Interactive streams beside a batch on a machine that exists in arithmetic only: the engine's decisions, no clock."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, Final

from worker.engine.batch import SequenceView, decide_step
from worker.engine.batch_share import BatchShare
from worker.engine.prefill_budget import PrefillBudget

MS = 1_000_000
ARRIVAL_MS = 5.0  # from the client to the engine, and from it to the next line of the batch


#: Rows, and milliseconds of a step of SmolLM2-135M in bf16 on one core, by processor time.
STEP_MS: Final = (
    *((1, 26.0), (2, 29.0), (4, 31.0), (8, 36.0), (12, 39.5), (16, 41.0)),
    *((32, 53.5), (48, 65.0), (64, 71.0), (256, 160.0)),
)


def step_ms_of_cpu(num_rows: int) -> float:
    """A step as measured; beyond one tile of 16 rows they are whole ones."""
    rows = num_rows if num_rows <= 16 else 16 * -(-num_rows // 16)
    for (below, below_ms), (above, above_ms) in pairwise(STEP_MS):
        if rows <= above:
            return below_ms + (above_ms - below_ms) * (rows - below) / (above - below)
    return STEP_MS[-1][1]


@dataclass
class Sequence:
    """A request of one choice."""

    is_batch: bool
    arrived_ms: float
    num_pending: int
    num_left: int
    token_ms: list[float] = field(default_factory=list)

    def candidate(self) -> Any:
        """As the share looks at it."""
        return SimpleNamespace(service_order=(self.is_batch, 0), sequence=self), self


@dataclass
class Outcome:
    """What a run came to."""

    streams: list[Sequence]
    num_lines: int
    lasted_ms: float

    @property
    def lines_per_s(self) -> float:
        return self.num_lines / self.lasted_ms * 1e3

    def first_token_ms(self, quantile: float) -> float:
        return pick(sorted(one.token_ms[0] - one.arrived_ms for one in self.streams), quantile)

    def gap_ms(self, quantile: float) -> float:
        gaps = [b - a for one in self.streams for a, b in zip(one.token_ms, one.token_ms[1:], strict=False)]
        return pick(sorted(gaps), quantile)


def pick(ordered: list[float], quantile: float) -> float:
    """A quantile of sorted values."""
    return ordered[min(len(ordered) - 1, int(quantile * len(ordered)))]


@dataclass(frozen=True)
class Load:
    """``streams_per_s`` Poisson arrivals of interactive streams, and ``in_flight`` lines of a batch at any time."""

    streams_per_s: float = 0.0
    in_flight: int = 0
    stream_prompt: int = 6  # what the prefix cache leaves of one
    stream_tokens: int = 24
    line_prompt: int = 12
    line_tokens: int = 16


def simulate(
    load: Load,
    *,
    lasts_ms: float,
    seed: int = 1,
    step_ms: Callable[[int], float] = step_ms_of_cpu,
    jitter: float = 0.0,
) -> Outcome:
    """Run ``load``; ``jitter`` is the standard deviation of a step's time, as a share of it."""
    chance, prefill = random.Random(seed), PrefillBudget()
    share = BatchShare(prefill)
    now_ms, next_ms, num_lines = 0.0, 0.0, 0
    ended: list[Sequence] = []
    running: list[Sequence] = []
    lines_at_ms = [0.0] * load.in_flight  # when the next lines of the batch come
    if load.streams_per_s:
        next_ms = chance.expovariate(load.streams_per_s) * 1e3
    while now_ms < lasts_ms:
        while load.streams_per_s and next_ms <= now_ms:
            running.append(Sequence(False, next_ms - ARRIVAL_MS, load.stream_prompt, load.stream_tokens))
            next_ms += chance.expovariate(load.streams_per_s) * 1e3
        for _ in [at_ms for at_ms in lines_at_ms if at_ms <= now_ms]:
            running.append(Sequence(True, now_ms, load.line_prompt, load.line_tokens))
        lines_at_ms = [at_ms for at_ms in lines_at_ms if at_ms > now_ms]
        if not running:
            now_ms = min(lines_at_ms + ([next_ms] if load.streams_per_s else []))
            continue
        running.sort(key=lambda one: one.is_batch)
        chosen = share.choose([one.candidate() for one in running])
        views = [SequenceView(i, one.num_pending) for i, (_, one) in enumerate(chosen)]
        num_decodes = sum(view.num_pending == 1 for view in views)
        shares = decide_step(views, prefill_tokens=share.choose_prompt_tokens(num_decodes))
        num_rows = sum(one.num_tokens for one in shares)
        took_ms = step_ms(num_rows) * max(0.7, chance.gauss(1.0, jitter))
        now_ms += took_ms
        share.observe(num_rows, int(took_ms * MS))
        prefill.observe(num_decodes, num_rows - num_decodes, int(took_ms * MS))
        for part in shares:
            sequence = chosen[part.index][1]
            sequence.num_pending -= part.num_tokens
            if not part.wants_logits:
                continue
            sequence.num_pending, sequence.num_left = 1, sequence.num_left - 1
            sequence.token_ms.append(now_ms)
            if sequence.num_left == 0:
                running.remove(sequence)
                if sequence.is_batch:
                    num_lines += 1
                    lines_at_ms.append(now_ms + ARRIVAL_MS)
                else:
                    ended.append(sequence)
    return Outcome(ended, num_lines, now_ms)
