"""The faults of a chaos run: what is done to which process, in an order that follows from the seed alone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from loadtest.chaos_cluster import Cluster

#: A process that is asked to stop for this long looks dead to its peers, and then writes again.
STOPPED_S: Final = (0.5, 6.0)
#: Redis is stopped for less: every client would time out together, which tells nothing about them.
REDIS_STOPPED_S: Final = (0.3, 2.5)


@dataclass(frozen=True, slots=True)
class FaultKind:
    """A role and what happens to it. ``stopped_s``: for SIGSTOP, how long until SIGCONT."""

    name: str
    role: str
    number: signal.Signals
    weight: float
    stopped_s: tuple[float, float] = STOPPED_S


KINDS: Final = (
    FaultKind("worker killed", "worker", signal.SIGKILL, 4),
    FaultKind("worker stopped", "worker", signal.SIGSTOP, 2),
    FaultKind("worker drained", "worker", signal.SIGTERM, 1),
    FaultKind("zygote killed", "zygote", signal.SIGKILL, 1),
    FaultKind("agent killed", "agent", signal.SIGKILL, 1.5),
    FaultKind("agent stopped", "agent", signal.SIGSTOP, 1),
    FaultKind("gateway killed", "gateway", signal.SIGKILL, 2),
    FaultKind("gateway stopped", "gateway", signal.SIGSTOP, 1),
    FaultKind("gateway drained", "gateway", signal.SIGTERM, 1),
    FaultKind("scheduler killed", "scheduler", signal.SIGKILL, 1.5),
    FaultKind("scheduler stopped", "scheduler", signal.SIGSTOP, 1),
    FaultKind("redis killed", "redis", signal.SIGKILL, 1),
    FaultKind("redis stopped", "redis", signal.SIGSTOP, 1, REDIS_STOPPED_S),
)
PAIR_PROBABILITY: Final = 0.2


@dataclass(frozen=True, slots=True)
class PlannedFault:
    """``after_s`` seconds after the one before: one kind, or two at once."""

    after_s: float
    kinds: tuple[FaultKind, ...]
    stopped_fraction: float  # of the range of each kind's ``stopped_s``
    choice: int  # which of the role's processes, modulo their number


@dataclass(slots=True)
class StruckFault:
    """A fault that found its process."""

    name: str
    at_s: float  # monotonic
    pid: int
    is_pair: bool


def plan_faults(seed: int, duration_s: float, every_s: float) -> list[PlannedFault]:
    """The schedule of a run: the same for the same seed. It leaves time to recover from the last fault."""
    rng = random.Random(seed)
    planned: list[PlannedFault] = []
    elapsed_s = 0.0
    while True:
        after_s = rng.uniform(0.4, 1.6) * every_s
        elapsed_s += after_s
        if elapsed_s > duration_s - 5.0:
            return planned
        first = rng.choices(KINDS, [kind.weight for kind in KINDS])[0]
        kinds = (first,)
        if rng.random() < PAIR_PROBABILITY:
            others = [kind for kind in KINDS if kind.role != first.role]
            kinds = (first, rng.choices(others, [kind.weight for kind in others])[0])
        planned.append(PlannedFault(after_s, kinds, rng.random(), rng.randrange(1 << 16)))


@dataclass(slots=True)
class Striker:
    """Carries out a plan on a cluster. ``say`` gets one line a fault."""

    cluster: Cluster
    say: Callable[[str], None]
    struck: list[StruckFault] = field(default_factory=list)
    missed: int = 0  # no process of that role lived
    _continuing: set[asyncio.Task[None]] = field(default_factory=set)

    async def run(self, plan: list[PlannedFault]) -> None:
        """Strike one after the other; every stopped process goes on at the end, whatever happens."""
        try:
            for fault in plan:
                await asyncio.sleep(fault.after_s)
                for kind in fault.kinds:
                    await self._strike(kind, fault, is_pair=len(fault.kinds) > 1)
            if self._continuing:
                await asyncio.wait(self._continuing)
        finally:
            for task in self._continuing:
                task.cancel()
            await asyncio.gather(*self._continuing, return_exceptions=True)

    async def _strike(self, kind: FaultKind, fault: PlannedFault, *, is_pair: bool) -> None:
        pids = await asyncio.to_thread(self.cluster.pids_of, kind.role)
        if not pids:
            self.missed += 1
            return
        pid = pids[fault.choice % len(pids)]
        try:
            os.kill(pid, kind.number)
        except ProcessLookupError:
            self.missed += 1
            return
        self.struck.append(StruckFault(kind.name, time.monotonic(), pid, is_pair))
        self.say(f"{kind.name} (pid {pid}){', in a pair' if is_pair else ''}")
        if kind.number is signal.SIGSTOP:
            low_s, high_s = kind.stopped_s
            stopped_s = low_s + (high_s - low_s) * fault.stopped_fraction
            task = asyncio.create_task(_continue_later(pid, stopped_s))
            self._continuing.add(task)
            task.add_done_callback(self._continuing.discard)


async def _continue_later(pid: int, after_s: float) -> None:
    try:
        await asyncio.sleep(after_s)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
