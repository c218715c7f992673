"""The agent's part of prepared models: keeps what the zygote has prepared a subset of what the agent holds sealed.

=================================== ============================================================
event                               what the zygote is told
=================================== ============================================================
a worker was forked                 prepare its snapshot, unless it was told before
a snapshot is not held any more     forget it
more than :data:`MAX_PREPARED`      forget the one that was used longest ago
another zygote is ready             prepare all again, except what two zygotes died of
preparing failed                    nothing: the snapshot's workers restore by themselves
=================================== ============================================================
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Final, Protocol

import structlog

from worker.spawn_order import ForgetPrepared, ModelPrepared, PrepareFailed, PrepareModel, SpawnedFds

MAX_PREPARED: Final = 16  # a prepared model takes some 15 MB of the zygote
MAX_DEATHS: Final = 2


class PreparingZygote(Protocol):
    """The part of :class:`worker.zygote_client.ZygoteClient` that preparing needs. Neither method ever fails."""

    async def prepare(self, message: PrepareModel, fds: SpawnedFds) -> None: ...

    async def forget(self, message: ForgetPrepared) -> None: ...


@dataclass(slots=True)
class _Asked:
    """``fds`` are copies, so that the memory files can be sent to the next zygote too; closed with the entry."""

    message: PrepareModel
    fds: SpawnedFds
    is_answered: bool = False
    num_deaths: int = 0  # of zygotes that were at it


class ModelPreparation:
    """Event loop only."""

    def __init__(self, zygote: PreparingZygote) -> None:
        self._zygote = zygote
        self._log = structlog.get_logger()
        self._asked: OrderedDict[str, _Asked] = OrderedDict()  # by snapshot id, longest unused first
        self._given_up: set[str] = set()  # a zygote died, or said no
        self._sends: set[asyncio.Task[None]] = set()

    def on_forked(self, message: PrepareModel, fds: SpawnedFds) -> None:
        """A worker of this snapshot was forked; ``fds`` stay the caller's.

        Raises:
            OSError: no descriptor is left to keep its files with.
        """
        snapshot_id = message.snapshot_id
        if snapshot_id in self._asked:
            self._asked.move_to_end(snapshot_id)
            return
        if snapshot_id in self._given_up:
            return
        while len(self._asked) >= MAX_PREPARED:
            self._forget(next(iter(self._asked)))
        self._asked[snapshot_id] = _Asked(message, fds.duplicate())
        self._start(self._prepare(snapshot_id))

    def on_dropped(self, snapshot_id: str) -> None:
        """The snapshot's memory files are about to be closed."""
        self._given_up.discard(snapshot_id)
        if snapshot_id in self._asked:
            self._forget(snapshot_id)

    def on_zygote_ready(self) -> None:
        """A new zygote knows nothing."""
        for snapshot_id, asked in self._asked.items():
            asked.is_answered = False
            self._start(self._prepare(snapshot_id))

    def on_zygote_died(self) -> None:
        """Whatever it was at may have been the cause."""
        for snapshot_id, asked in list(self._asked.items()):
            asked.num_deaths = 0 if asked.is_answered else asked.num_deaths + 1
            if asked.num_deaths >= MAX_DEATHS:
                reason = f"{asked.num_deaths} zygotes died while they prepared it"
                self._log.error("model_not_prepared", snapshot_id=snapshot_id, reason=reason)
                self._give_up(snapshot_id)

    def on_answer(self, answer: ModelPrepared | PrepareFailed) -> None:
        """What became of a preparation."""
        asked = self._asked.get(answer.snapshot_id)
        if asked is None:
            return  # dropped meanwhile
        asked.is_answered = True
        if isinstance(answer, ModelPrepared):
            self._log.info("model_prepared", snapshot_id=answer.snapshot_id, elapsed_ms=answer.elapsed_ms)
        else:
            remedy = "its workers restore by themselves"
            self._log.warning("model_not_prepared", snapshot_id=answer.snapshot_id, reason=answer.reason, remedy=remedy)
            self._give_up(answer.snapshot_id)

    def close(self) -> None:
        """Close every copy. Idempotent; the zygote is ended by its own owner."""
        for task in self._sends:
            task.cancel()
        for snapshot_id in list(self._asked):
            self._remove(snapshot_id)

    def _forget(self, snapshot_id: str) -> None:
        self._remove(snapshot_id)
        self._start(self._zygote.forget(ForgetPrepared(snapshot_id)))

    def _give_up(self, snapshot_id: str) -> None:
        self._remove(snapshot_id)
        self._given_up.add(snapshot_id)

    def _remove(self, snapshot_id: str) -> None:
        self._asked.pop(snapshot_id).fds.close()

    async def _prepare(self, snapshot_id: str) -> None:
        asked = self._asked.get(snapshot_id)
        if asked is None:
            return
        fds = asked.fds.duplicate()  # may be closed while this waits
        try:
            await self._zygote.prepare(asked.message, fds)
        finally:
            fds.close()

    def _start(self, send: Coroutine[Any, Any, None]) -> None:
        """Sends leave in the order in which they are started: tasks begin so, and the channel's lock is fair."""
        task = asyncio.get_running_loop().create_task(send, name="prepared models")
        self._sends.add(task)
        task.add_done_callback(self._sends.discard)
