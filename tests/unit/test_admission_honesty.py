"""Admission by estimated wait against a simulated worker: is what it tells clients true?"""

from __future__ import annotations

import heapq
import random
import statistics
from dataclasses import dataclass, field

import pytest

from scheduler.config import ModelPolicy, SchedulerConfig
from scheduler.contract.states import Priority
from scheduler.gateway.admission import Admission, QueueLimit, decide_retry_after_s
from scheduler.gateway.settings import GatewaySettings

CAPACITY = 8
MAX_WAIT_S = 5.0
NUM_ARRIVALS = 4000


@dataclass
class Refusal:
    """What one client was told, and what would have been."""

    told_wait_s: float
    true_wait_s: float
    depth_on_return: int
    limit: int


@dataclass
class Simulation:
    """First come, first served by :data:`CAPACITY` places; service times and arrivals are random, the clock is ours."""

    overload: float
    rng: random.Random = field(default_factory=lambda: random.Random(3))
    waits_s: list[float] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)

    def __post_init__(self) -> None:
        policy = ModelPolicy(max_running=CAPACITY, max_wait_s=MAX_WAIT_S, max_queued=1_000_000)
        self.admission = Admission(GatewaySettings(), SchedulerConfig(defaults=policy))
        self.free_s = [0.0] * CAPACITY  # when each place is free, as far as is known
        self.ends: list[tuple[float, float]] = []  # (end, service time) of what was taken

    def run(self) -> None:
        now_s = 0.0
        for _ in range(NUM_ARRIVALS):
            now_s += self.rng.expovariate(self.overload * CAPACITY)  # the mean service time is 1 s
            while self.ends and self.ends[0][0] <= now_s:
                self.admission.on_served("m", heapq.heappop(self.ends)[1])
            limit = self.admission.queue_limit("m", Priority.INTERACTIVE, 1)
            depth = len(self.ends)
            if depth < limit.max_queued:
                self._take(now_s)
            else:
                self._refuse(now_s, depth, limit)

    def _take(self, now_s: float) -> None:
        service_s = self.rng.uniform(0.5, 1.5)
        start_s = max(now_s, heapq.heappop(self.free_s))
        heapq.heappush(self.free_s, start_s + service_s)
        heapq.heappush(self.ends, (start_s + service_s, service_s))
        self.waits_s.append(start_s - now_s)

    def _refuse(self, now_s: float, depth: int, limit: QueueLimit) -> None:
        assert limit.service_s is not None
        told_s = (depth - CAPACITY + 1) * limit.service_s / CAPACITY
        back_s = now_s + decide_retry_after_s(depth, limit)
        still_there = sum(end_s > back_s for end_s, _ in self.ends)
        self.refusals.append(Refusal(told_s, max(0.0, self.free_s[0] - now_s), still_there, limit.max_queued))


@pytest.mark.parametrize("overload", [1.3, 3.0])
def test_what_clients_are_told_is_true(overload: float) -> None:
    """Under overload: who is taken waits no longer than promised, the wait that a refusal names is the true one, and
    who comes back after Retry-After finds room if nobody else came."""
    simulation = Simulation(overload)
    simulation.run()
    assert len(simulation.refusals) > NUM_ARRIVALS // 10
    assert max(simulation.waits_s) <= 1.5 * MAX_WAIT_S
    assert statistics.median(simulation.waits_s) >= 0.5 * MAX_WAIT_S  # and nobody is refused without need
    errors = [abs(one.told_wait_s - one.true_wait_s) for one in simulation.refusals]
    assert statistics.median(errors) <= 0.15 * MAX_WAIT_S
    found_room = [one.depth_on_return < one.limit for one in simulation.refusals]
    assert statistics.mean(found_room) >= 0.9


def test_without_overload_nobody_is_refused() -> None:
    """At two thirds of what the workers can do, nobody hears a no."""
    simulation = Simulation(0.66)
    simulation.run()
    assert simulation.refusals == []
