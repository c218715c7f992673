"""Workers that were stopped by a signal: ended, so that their requests go on elsewhere within seconds.

A stopped process (state T) does nothing until somebody continues it, while its requests wait for its leases to run out.
A busy one, in a long prefill or a page fault, is in another state however long it takes, so it cannot be taken for a
stopped one; one in a debugger is "t". A worker that cannot be told from a busy one is left to the scheduler, which
gives it up when its report runs out.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Final

LOOK_EVERY_S: Final = 0.25
STOPPED: Final = "T"  # Source: proc(5), /proc/pid/stat, field 3; "t" is a tracer's stop


class StoppedWorkers:
    """What the agent has seen of its workers' states. Event loop only.

    ``list_pids`` gives the pid of each worker; ``end`` is called, once, with one that stood still for ``limit_s``.
    """

    def __init__(self, list_pids: Callable[[], Mapping[str, int]], end: Callable[[str], None], limit_s: float) -> None:
        self._list_pids = list_pids
        self._end = end
        self._limit_s = limit_s
        self._since_s: dict[str, float] = {}
        self._ended: set[str] = set()

    async def watch(self) -> None:
        """For ever; a read of ``/proc`` for each worker, four times a second."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            self.look(time.monotonic())

    def look(self, now_s: float) -> None:
        """One look at every worker."""
        pids = self._list_pids()
        stopped = {worker_id for worker_id, pid in pids.items() if read_state(pid) == STOPPED}
        self._since_s = {worker_id: self._since_s.get(worker_id, now_s) for worker_id in stopped}
        self._ended &= pids.keys()
        for worker_id, since_s in self._since_s.items():
            if now_s - since_s >= self._limit_s and worker_id not in self._ended:
                self._ended.add(worker_id)
                self._end(worker_id)


def read_state(pid: int) -> str:
    """The kernel's letter for what a process does; empty if it is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
            return stat.read().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
