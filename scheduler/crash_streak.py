"""Workers of one model that die one after the other while they run requests: how long the next one has to wait.

A request that kills workers is parked by itself (:data:`scheduler.contract.job_queue.MAX_CRASHES`); this is for a model
whose workers die of any request. A single death must not cost a stream more than a wake, so the first ones are followed
at once; from then on the wait doubles, so that a broken model leaves the machine to the others.

========================== ==================================================================================
deaths in a row            the next worker is started
========================== ==================================================================================
1 and 2                    at once
3, 4, 5, ...               after 0.5, 1, 2, ... 30 s, each times 0.5 to 1.5, so that models do not move in step
10 and more                likewise; requests are refused meanwhile, with the last cause and when to come back
a worker stayed up 10 s    the count begins anew
========================== ==================================================================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

from scheduler.contract.errors import ErrorCode, ErrorInfo

DEATHS_AT_ONCE: Final = 2
FIRST_DELAY_S: Final = 0.5
MAX_DELAY_S: Final = 30.0
STEADY_S: Final = 10.0
#: Above twice the deaths that one poisonous request can cause: two of them in a row do not close a model.
REFUSED_FROM: Final = 10


def compute_delay_s(num_deaths: int, jitter: float) -> float:
    """Seconds to wait after ``num_deaths`` in a row. ``jitter`` is in [0, 1)."""
    doublings = num_deaths - DEATHS_AT_ONCE - 1
    return 0.0 if doublings < 0 else min(MAX_DELAY_S, FIRST_DELAY_S * 2.0 ** min(doublings, 16)) * (0.5 + jitter)


@dataclass(slots=True)
class CrashStreak:
    """The deaths of one model's workers. Written only by :class:`scheduler.fleet.Fleet`; times are its clock's."""

    num_deaths: int = 0
    retry_at_s: float = 0.0
    last_error: ErrorInfo | None = None
    _ready_s: dict[str, float] = field(default_factory=dict)  # since when the present workers are up

    def on_ready(self, worker_id: str, now_s: float) -> None:
        """A worker can serve from now on."""
        self._ready_s.setdefault(worker_id, now_s)

    def on_gone(self, worker_id: str) -> None:
        """A worker ended in good order."""
        self._ready_s.pop(worker_id, None)

    def on_death(self, worker_id: str, error: ErrorInfo, now_s: float, jitter: float) -> None:
        """A worker died while it ran requests."""
        ready_s = self._ready_s.pop(worker_id, now_s)
        self.num_deaths = 1 if now_s - ready_s >= STEADY_S else self.num_deaths + 1
        self.retry_at_s = now_s + compute_delay_s(self.num_deaths, jitter)
        self.last_error = error

    def end_if_steady(self, now_s: float) -> bool:
        """Begin anew once a worker has stayed up; whether that ended a streak of waits."""
        if not self.num_deaths or not any(now_s - ready_s >= STEADY_S for ready_s in self._ready_s.values()):
            return False
        was_held_back = self.num_deaths > DEATHS_AT_ONCE
        self.num_deaths, self.last_error = 0, None
        return was_held_back

    def forgive(self) -> None:
        """Begin anew: an operator wants it, or there is another snapshot."""
        self.num_deaths, self.retry_at_s, self.last_error = 0, 0.0, None


def describe_held_back(model: str, num_deaths: int, last_error: ErrorInfo | None, wait_s: float) -> ErrorInfo:
    """What requests are told that are refused until the next try."""
    retry_after_s = max(1, math.ceil(wait_s))
    cause = f" Last cause: {last_error.message}." if last_error else ""
    message = (
        f"model {model!r} is held back: {num_deaths} of its workers in a row died while they ran requests, none stayed "
        f"up for {STEADY_S:g} s. The next one is tried in {retry_after_s} s.{cause} `glowplug logs` has more"
    )
    return ErrorInfo(ErrorCode.WAKE_FAILED, message, retry_after_s=retry_after_s)
