"""Keeps spares: on each GPU a number of warm processes that a wake can take.

=========== =========== =================================================================
from        to          when
=========== =========== =================================================================
(none)      starting    a device has fewer than it should; after a pause where one was
                        taken (the wake goes first) or has failed (longer each time)
starting    warm        it says so: context, kernels and pinned ring are there
warm        (taken)     an order for its device: it is a worker now, and nobody's here
any         (none)      it ended, its device has a fault, or the agent stops
=========== =========== =================================================================
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Protocol

import structlog

from worker.agent_settings import AgentSettings
from worker.spawn_order import ForkSpare, SpareReady, SpareRefused, SpawnedFds, SpawnOrder, TakeOrder
from worker.zygote_channel import ChannelBroken, PacketReader, encode_packet, send_packet

#: A wake that took a spare has its device to itself for so long.
REPLACE_AFTER_S: Final = 2.0
#: Pauses after spares that failed one after the other.
RETRY_AFTER_S: Final = (1.0, 5.0, 30.0, 60.0)


class SpareForker(Protocol):
    """The part of :class:`worker.zygote_client.ZygoteClient` that spares need."""

    async def spawn_spare(self, spare: ForkSpare, channel_fd: int) -> int:
        """Fork a spare; its process id. Raises SpawnFailed."""


@dataclass(slots=True, eq=False)
class Spare:
    """One process. ``channel`` is the agent's end, closed when it is taken, ends or is let go."""

    spare_id: str
    device: str
    channel: socket.socket
    reader: PacketReader[SpareReady | SpareRefused]
    pid: int = 0  # 0 until forked
    is_warm: bool = False


class SpareWorkers:
    """All of a host's. Event loop only. ``on_changed`` hears of each that is warm."""

    def __init__(self, zygote: SpareForker, settings: AgentSettings, on_changed: Callable[[], None]) -> None:
        self._zygote = zygote
        self._settings = settings
        self._on_changed = on_changed
        self._log = structlog.get_logger()
        self._spares: dict[str, Spare] = {}
        self._devices: tuple[str, ...] = ()
        self._not_before_s: dict[str, float] = {}  # by device
        self._failures: dict[str, int] = {}  # by device, in a row
        self._starts: dict[asyncio.Task[None], str] = {}  # with their devices

    def keep(self, devices: Iterable[str]) -> None:
        """Have the spares on ``devices`` that the settings want, and none elsewhere. Call it again and again: what is
        missing is started by and by."""
        self._devices = tuple(devices) if self._settings.spare_workers else ()
        for spare in [spare for spare in self._spares.values() if spare.device not in self._devices]:
            self._drop(spare)
        for device in self._devices:
            there = sum(spare.device == device for spare in self._spares.values())
            there += sum(starting == device for starting in self._starts.values())
            if there < self._settings.spare_workers and time.monotonic() >= self._not_before_s.get(device, 0.0):
                task = asyncio.create_task(self._start(device), name="spare")
                self._starts[task] = device
                task.add_done_callback(self._on_started)

    def pids(self) -> dict[str, dict[int, bool]]:
        """By device, the processes that are kept, and whether they are warm."""
        found: dict[str, dict[int, bool]] = {}
        for spare in self._spares.values():
            if spare.pid:
                found.setdefault(spare.device, {})[spare.pid] = spare.is_warm
        return found

    def take_nowait(self, device: str) -> Spare | None:
        """A warm spare of ``device``, which is the caller's then; None: there is none."""
        spare = next((s for s in self._spares.values() if s.is_warm and s.device == device), None)
        if spare is not None:
            del self._spares[spare.spare_id]
            asyncio.get_running_loop().remove_reader(spare.channel)
            self._not_before_s[device] = time.monotonic() + REPLACE_AFTER_S
        return spare

    async def hand_over(self, spare: Spare, order: SpawnOrder, fds: SpawnedFds) -> None:
        """Make a spare that was taken the worker of ``order``.

        Raises:
            OSError: it has ended meanwhile.
            ChannelBroken: the order is too large for a message; the spare ends.
        """
        with spare.channel as channel:
            packet = encode_packet(TakeOrder(order), len(fds.all))
            sent = send_packet(channel, packet, fds.all)
            if sent < len(packet):  # the manifest of a large model
                await asyncio.get_running_loop().sock_sendall(channel, packet[sent:])

    def on_exit(self, spare_id: str) -> bool:
        """A process was reaped; whether it was a spare."""
        spare = self._spares.get(spare_id)
        if spare is None:
            return False
        if not spare.is_warm:
            self._on_failure(spare.device)
        self._log.error("spare_ended", spare_id=spare_id, pid=spare.pid, was_warm=spare.is_warm)
        self._drop(spare)
        return True

    def close(self) -> None:
        """Let all go; they end. Idempotent."""
        self._devices = ()
        for task in self._starts:
            task.cancel()
        for spare in list(self._spares.values()):
            self._drop(spare)

    async def _start(self, device: str) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        spare = Spare(f"spare-{secrets.token_hex(4)}", device, ours, PacketReader(SpareReady | SpareRefused))
        self._spares[spare.spare_id] = spare
        asyncio.get_running_loop().add_reader(ours, self._on_readable, spare)
        order = ForkSpare(spare.spare_id, device, self._settings.backend, self._settings.num_threads)
        try:
            with theirs:
                spare.pid = await self._zygote.spawn_spare(order, theirs.fileno())
        except BaseException:
            self._drop(spare)
            self._on_failure(device)
            raise

    def _on_started(self, task: asyncio.Task[None]) -> None:
        del self._starts[task]
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log.error("spare_not_started", error=str(error))

    def _on_readable(self, spare: Spare) -> None:
        try:
            if not spare.reader.receive(spare.channel):
                asyncio.get_running_loop().remove_reader(spare.channel)  # its end is told by who reaps it
            for message, _ in spare.reader.messages():
                self._on_message(spare, message)
        except BlockingIOError:
            return
        except (ChannelBroken, OSError) as error:
            self._log.error("spare_channel_broken", spare_id=spare.spare_id, error=str(error))
            self._drop(spare)

    def _on_message(self, spare: Spare, message: SpareReady | SpareRefused) -> None:
        if isinstance(message, SpareReady):
            spare.is_warm = True
            self._failures.pop(spare.device, None)
            self._log.info("spare_warm", spare_id=spare.spare_id, pid=spare.pid, elapsed_ms=message.elapsed_ms)
            self._on_changed()
            return
        self._log.error("spare_refused", spare_id=spare.spare_id, device=spare.device, reason=message.reason)
        self._on_failure(spare.device)
        self._drop(spare)

    def _on_failure(self, device: str) -> None:
        failures = self._failures[device] = self._failures.get(device, 0) + 1
        self._not_before_s[device] = time.monotonic() + RETRY_AFTER_S[min(failures, len(RETRY_AFTER_S)) - 1]

    def _drop(self, spare: Spare) -> None:
        """Forget it; without its channel it ends."""
        if self._spares.pop(spare.spare_id, None) is not None:
            asyncio.get_running_loop().remove_reader(spare.channel)
            spare.channel.close()
