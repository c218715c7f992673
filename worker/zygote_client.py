"""The agent's side of the zygote: starts it, orders forks and signals, hears of exits, and replaces it if it dies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Final

import structlog

from worker.model_preparation import ModelPreparation
from worker.spawn_order import (
    ForgetPrepared,
    ForkRefused,
    ForkSpare,
    ForkWorker,
    FromZygote,
    ModelPrepared,
    PrepareFailed,
    PrepareModel,
    SignalWorker,
    SpawnedFds,
    SpawnOrder,
    ToZygote,
    WorkerExited,
    WorkerForked,
    ZygoteReady,
)
from worker.zygote_channel import ChannelBroken, PacketReader, encode_packet, send_packet
from worker.zygote_process import ZYGOTE_COMMAND, ZygoteProcess, start_zygote_process

RESTART_BACKOFF_S: Final = (0.05, 0.2, 1.0, 5.0)  # by deaths in a row
LONG_LIFE_S: Final = 10.0  # a zygote that lived this long did not die of its start
SPAWN_TIMEOUT_S: Final = 20.0  # covers the start of a new zygote
CLOSE_TIMEOUT_S: Final = 5.0


class SpawnFailed(Exception):
    """No worker process was made; the message says why."""


class ZygoteClient:
    """One zygote at a time. Event loop only.

    ``on_exit`` hears of every reaped worker; ``on_lost`` gets the ids of the workers that died with their zygote.
    ``started`` is the first zygote, if the caller has started it already.
    """

    def __init__(
        self,
        *,
        on_exit: Callable[[WorkerExited], None],
        on_lost: Callable[[list[str]], None],
        command: Sequence[str] = ZYGOTE_COMMAND,
        started: ZygoteProcess | None = None,
    ) -> None:
        self._on_exit = on_exit
        self._on_lost = on_lost
        self._command = tuple(command)
        self._started = started
        self._log = structlog.get_logger()
        self._channel: socket.socket | None = None
        self._gone = asyncio.Event()
        self._ready = asyncio.Event()
        self._send_lock = asyncio.Lock()
        self._forks: dict[str, asyncio.Future[int]] = {}  # worker id -> pid, until answered
        self._alive: set[str] = set()  # forked and not reaped; written only by `_on_message` and `_forget_workers`
        self._supervisor: asyncio.Task[None] | None = None
        self._killing: asyncio.Future[None] | None = None  # holds a reference while it runs
        self.pid = 0  # of the present zygote; 0 while there is none
        self.models: Final = ModelPreparation(self)

    @property
    def is_ready(self) -> bool:
        """Whether a fork would be served at once."""
        return self._ready.is_set()

    async def start(self) -> None:
        """Start the zygote and wait until it is ready.

        Raises:
            SpawnFailed: not ready within :data:`SPAWN_TIMEOUT_S`.
        """
        self._supervisor = asyncio.create_task(self._supervise(), name="zygote-supervisor")
        await self._wait_ready()

    async def spawn(self, order: SpawnOrder, fds: SpawnedFds) -> int:
        """Fork a worker; its process id. The caller keeps its own copies of ``fds``.

        Raises:
            SpawnFailed: the fork was refused, or the zygote died or did not answer.
        """
        return await self._fork(order.worker_id, ForkWorker(order), fds.all)

    async def spawn_spare(self, spare: ForkSpare, channel_fd: int) -> int:
        """Fork a spare; its process id. The caller keeps its own copy of ``channel_fd``.

        Raises:
            SpawnFailed: as for :meth:`spawn`.
        """
        return await self._fork(spare.spare_id, spare, (channel_fd,))

    async def _fork(self, worker_id: str, message: ForkWorker | ForkSpare, fds: tuple[int, ...]) -> int:
        await self._wait_ready()
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._forks[worker_id] = answer
        try:
            await self._send(message, fds)
            async with asyncio.timeout(SPAWN_TIMEOUT_S):
                return await answer
        except TimeoutError:
            raise SpawnFailed(f"the zygote did not answer within {SPAWN_TIMEOUT_S:g} s") from None
        except OSError as error:
            raise SpawnFailed(f"the zygote went away: {error}") from error
        finally:
            self._forks.pop(worker_id, None)

    async def signal(self, worker_id: str, number: int) -> None:
        """Send a signal to a worker; nothing happens if it has ended."""
        if worker_id not in self._alive:
            return
        try:
            await self._send(SignalWorker(worker_id, number))
        except OSError:
            return  # the zygote is gone and its workers with it

    async def prepare(self, message: PrepareModel, fds: SpawnedFds) -> None:
        """Send ``message``; without effect if there is no zygote. For :attr:`models`, which gets the answer."""
        try:
            await self._send(message, fds.all)
        except (OSError, ChannelBroken) as error:
            self._log.warning("model_not_prepared", snapshot_id=message.snapshot_id, reason=str(error))

    async def forget(self, message: ForgetPrepared) -> None:
        """Send ``message``; a zygote that is gone has forgotten anyway."""
        with contextlib.suppress(OSError):
            await self._send(message)

    async def aclose(self) -> None:
        """Close the channel, on which the zygote exits and the kernel kills its workers; wait for that. Idempotent."""
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            supervisor.cancel()
            await asyncio.gather(supervisor, return_exceptions=True)
        self.models.close()

    # --- life of the process ------------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        """Keep one zygote running until cancelled."""
        deaths = 0
        while True:
            started_mono_s = time.monotonic()
            try:
                code = await self._run_one()
            except OSError as error:  # no descriptor or no process to be had: that passes
                code = None
                self._log.error("zygote_not_started", error=str(error))
            deaths = 1 if time.monotonic() - started_mono_s > LONG_LIFE_S else deaths + 1
            backoff_s = RESTART_BACKOFF_S[min(deaths, len(RESTART_BACKOFF_S)) - 1]
            self._log.error("zygote_died", exit_code=code, deaths_in_a_row=deaths, next_start_in_s=backoff_s)
            await asyncio.sleep(backoff_s)

    async def _run_one(self) -> int:
        """Run one zygote until it ends; its exit code. On cancellation it is ended first."""
        started, self._started = self._started or start_zygote_process(self._command), None
        process, ours = started
        self._channel, self.pid = ours, process.pid
        self._gone.clear()
        reader: PacketReader[FromZygote] = PacketReader(FromZygote)
        loop = asyncio.get_running_loop()
        loop.add_reader(ours, self._on_readable, ours, reader)
        try:
            await self._gone.wait()
        finally:
            loop.remove_reader(ours)
            ours.close()
            self._channel, self.pid = None, 0
            self._ready.clear()
            self.models.on_zygote_died()
            self._forget_workers()
            code = await _wait_or_kill(process)
        return code

    def _on_readable(self, channel: socket.socket, reader: PacketReader[FromZygote]) -> None:
        try:
            is_open = reader.receive(channel)
            for message, _ in reader.messages():
                self._on_message(message)
        except BlockingIOError:
            return
        except ChannelBroken as error:
            self._log.error("zygote_channel_broken", error=str(error))
            is_open = False
        if not is_open:
            asyncio.get_running_loop().remove_reader(channel)
            self._gone.set()

    def _on_message(self, message: FromZygote) -> None:
        match message:
            case ZygoteReady(pid, num_modules, resident_bytes):
                self._log.info("zygote_ready", pid=pid, modules=num_modules, resident_bytes=resident_bytes)
                self._ready.set()
                self.models.on_zygote_ready()
            case ModelPrepared() | PrepareFailed():
                self.models.on_answer(message)
            case WorkerForked(worker_id, pid):
                self._alive.add(worker_id)
                answer = self._forks.get(worker_id)
                if answer is not None and not answer.done():
                    answer.set_result(pid)
                else:  # whoever ordered it gave up: nobody would ever end this worker
                    self._killing = asyncio.ensure_future(self.signal(worker_id, signal.SIGKILL))
            case ForkRefused(worker_id, reason):
                answer = self._forks.get(worker_id)
                if answer is not None and not answer.done():
                    answer.set_exception(SpawnFailed(reason))
            case WorkerExited():
                self._alive.discard(message.worker_id)
                self._on_exit(message)

    def _forget_workers(self) -> None:
        """The zygote is gone: so are its workers, by PR_SET_PDEATHSIG."""
        for answer in self._forks.values():
            if not answer.done():
                answer.set_exception(SpawnFailed("the zygote died"))
        lost, self._alive = sorted(self._alive), set()
        if lost:
            self._on_lost(lost)

    # --- sending ------------------------------------------------------------------------------------------------

    async def _wait_ready(self) -> None:
        try:
            async with asyncio.timeout(SPAWN_TIMEOUT_S):
                await self._ready.wait()
        except TimeoutError:
            raise SpawnFailed(f"no zygote was ready within {SPAWN_TIMEOUT_S:g} s; see its log lines above") from None

    async def _send(self, message: ToZygote, fds: Sequence[int] = ()) -> None:
        """Raises OSError when the zygote is gone."""
        packet = encode_packet(message, len(fds))
        async with self._send_lock:
            channel = self._channel
            if channel is None:
                raise BrokenPipeError("no zygote is running")
            while True:
                try:
                    sent = send_packet(channel, packet, fds)
                    break
                except BlockingIOError:
                    await _wait_writable(channel)
            if sent < len(packet):
                await asyncio.get_running_loop().sock_sendall(channel, packet[sent:])


async def _wait_writable(channel: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    writable = asyncio.Event()
    loop.add_writer(channel, writable.set)
    try:
        await writable.wait()
    finally:
        loop.remove_writer(channel)


async def _wait_or_kill(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process that was told to end; past :data:`CLOSE_TIMEOUT_S`, or without a descriptor to wait with, kill
    it."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    try:
        pidfd = os.pidfd_open(process.pid)
    except OSError:
        process.kill()
        return process.wait()
    loop.add_reader(pidfd, ended.set)
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await ended.wait()
    except TimeoutError:
        process.kill()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
    return process.wait()
