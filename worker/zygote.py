"""The zygote: a process with everything imported and one thread, which forks workers in about a millisecond.

It stays single-threaded for ever, because a fork copies only the calling thread and leaves the locks of all others
as they were. Hence a plain blocking loop, no asyncio, and no library that starts threads before the fork. Garbage
collection is frozen before the first fork, so that a child's collections do not write to (and so copy) shared pages.

Life and death: when the agent's end of the channel closes, the zygote exits; when the zygote exits, for whatever
reason, the kernel kills its workers (PR_SET_PDEATHSIG). No worker can outlive its agent.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Final, Protocol

import structlog

from scheduler.contract.environment import read_process_settings
from scheduler.contract.telemetry import configure_logging
from worker.spawn_order import (
    NUM_SPAWN_FDS,
    ForgetPrepared,
    ForkRefused,
    ForkSpare,
    ForkWorker,
    FromZygote,
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
from worker.zygote_channel import PacketReader, encode_packet, send_packet

#: Runs in the child with the order, its file descriptors and the instant of the fork; the result is its exit code.
RunWorker = Callable[[SpawnOrder, SpawnedFds, int], int]

RunSpare = Callable[[ForkSpare, int, int], int]

EXIT_CRASHED: Final = 70  # EX_SOFTWARE
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15

_prctl = ctypes.CDLL(None, use_errno=True).prctl


class ThreadsRunning(Exception):
    """The zygote has more than one thread; forking it would copy locks that nobody will ever release."""


class ModelPreparer(Protocol):
    """What the zygote knows of models; see :class:`worker.prepared_models.PreparedModels`."""

    def begin(self, message: PrepareModel, fds: SpawnedFds) -> None: ...

    def close_files(self) -> None: ...

    def forget(self, snapshot_id: str) -> None: ...

    def wait_ms(self) -> int | None: ...

    def step(self) -> FromZygote | None: ...

    def before_fork(self, order: SpawnOrder, fds: SpawnedFds) -> None: ...

    def after_fork(self) -> None: ...


class Zygote:
    """The blocking loop. One thread, the process's only one. Without ``preparer`` workers restore by themselves;
    without ``run_spare`` there are no spares."""

    def __init__(
        self,
        channel: socket.socket,
        run_worker: RunWorker,
        preparer: ModelPreparer | None = None,
        run_spare: RunSpare | None = None,
    ) -> None:
        self._channel = channel
        self._run_worker = run_worker
        self._preparer = preparer
        self._run_spare = run_spare
        self._reader: PacketReader[ToZygote] = PacketReader(ToZygote)
        self._workers: dict[int, str] = {}  # pid -> worker id, until reaped
        self._pid = os.getpid()
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def serve(self) -> None:
        """Fork and reap until the agent closes the channel.

        Raises:
            ThreadsRunning: this process is not fit to be forked.
        """
        check_single_threaded()
        signal.signal(signal.SIGCHLD, _wake_only)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is the agent's to handle
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        self._send(ZygoteReady(self._pid, len(sys.modules), _resident_bytes()))
        poller = select.poll()
        poller.register(self._channel, select.POLLIN)
        poller.register(self._wake_read, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poller.poll(self._preparer.wait_ms() if self._preparer is not None else None)}
            if not ready:
                self._prepare_further()
            if self._wake_read in ready:
                _drain(self._wake_read)
                self._reap()
            if self._channel.fileno() in ready and not self._take_messages():
                return

    def _take_messages(self) -> bool:
        """Handle what arrived; False when the agent is gone."""
        if not self._reader.receive(self._channel):
            return False
        for message, fds in self._reader.messages():
            match message:
                case ForkWorker(order):
                    self._fork(order, fds)
                case ForkSpare():
                    self._fork_spare(message, fds)
                case SignalWorker(worker_id, number):
                    self._signal(worker_id, number)
                case PrepareModel():
                    self._prepare(message, fds)
                case ForgetPrepared(snapshot_id):
                    if self._preparer is not None:
                        self._preparer.forget(snapshot_id)
        return True

    def _prepare(self, message: PrepareModel, fds: tuple[int, ...]) -> None:
        try:
            if self._preparer is None:
                self._send(PrepareFailed(message.snapshot_id, "not offered here"))
            elif len(fds) not in NUM_SPAWN_FDS:
                reason = f"{len(fds)} file descriptors came, expected 2 to 6"
                self._send(PrepareFailed(message.snapshot_id, reason))
            else:
                self._preparer.begin(message, SpawnedFds(*fds))
        except OSError as error:
            self._send(PrepareFailed(message.snapshot_id, f"its files cannot be kept: {error.strerror}"))
        finally:
            for fd in fds:
                os.close(fd)

    def _prepare_further(self) -> None:
        """One piece of preparation, while no order waits.

        Raises:
            ThreadsRunning: it started a thread; this process can fork no more.
        """
        answer = self._preparer.step() if self._preparer is not None else None
        check_single_threaded()
        if answer is not None:
            self._send(answer)

    def _fork(self, order: SpawnOrder, fds: tuple[int, ...]) -> None:
        try:
            if len(fds) not in NUM_SPAWN_FDS:
                self._send(ForkRefused(order.worker_id, f"{len(fds)} file descriptors came, expected 2 to 6"))
                return
            if self._preparer is not None:
                self._preparer.before_fork(order, SpawnedFds(*fds))
            try:
                pid = os.fork()
            except OSError as error:
                self._send(ForkRefused(order.worker_id, f"fork failed: {error.strerror}"))
                return
            if pid == 0:
                run = functools.partial(self._run_worker, order, SpawnedFds(*fds), time.monotonic_ns())
                self._become(order.worker_id, order.model, run)
            self._workers[pid] = order.worker_id
            self._send(WorkerForked(order.worker_id, pid))
        finally:
            if self._preparer is not None:
                self._preparer.after_fork()
            for fd in fds:
                os.close(fd)

    def _fork_spare(self, spare: ForkSpare, fds: tuple[int, ...]) -> None:
        try:
            if self._run_spare is None or len(fds) != 1:
                self._send(ForkRefused(spare.spare_id, f"no spares here, or {len(fds)} descriptors instead of 1"))
                return
            try:
                pid = os.fork()
            except OSError as error:
                self._send(ForkRefused(spare.spare_id, f"fork failed: {error.strerror}"))
                return
            if pid == 0:
                run = functools.partial(self._run_spare, spare, fds[0], time.monotonic_ns())
                self._become(spare.spare_id, "spare", run)
            self._workers[pid] = spare.spare_id
            self._send(WorkerForked(spare.spare_id, pid))
        finally:
            for fd in fds:
                os.close(fd)

    def _become(self, worker_id: str, name: str, run: Callable[[], int]) -> None:
        """The child's whole life; never returns, so that no frame of the zygote is unwound in it."""
        code = EXIT_CRASHED
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.close(self._wake_read)
            os.close(self._wake_write)
            self._channel.close()
            self._reader.close()
            if self._preparer is not None:
                self._preparer.close_files()
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != self._pid:  # the zygote died before the line above could bind us to it
                os._exit(EXIT_CRASHED)
            _prctl(_PR_SET_NAME, f"gp:{name}".encode()[:15], 0, 0, 0)
            code = run()
        except BaseException:  # whatever it is, it must not run on into the zygote's loop
            structlog.get_logger().exception("worker crashed", worker_id=worker_id, model=name)
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):  # a full disk must not let the child run on, either
                    stream.flush()
            os._exit(code)

    def _signal(self, worker_id: str, number: int) -> None:
        for pid, known in self._workers.items():
            if known == worker_id:
                os.kill(pid, number)  # cannot hit a stranger: not reaped yet, so its id is not free

    def _reap(self) -> None:
        while self._workers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            worker_id = self._workers.pop(pid, "")
            self._send(WorkerExited(worker_id, pid, status))

    def _send(self, message: FromZygote) -> None:
        packet = encode_packet(message)
        while packet:
            packet = packet[send_packet(self._channel, packet) :]


def check_single_threaded() -> None:
    """Raise :class:`ThreadsRunning` if this process has a second thread."""
    names = []
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/comm") as comm:
            names.append(comm.read().strip())
    if len(names) != 1:
        raise ThreadsRunning(
            f"the zygote has {len(names)} threads ({', '.join(sorted(names))}), exactly 1 can be forked safely; "
            "look for a library that starts threads when imported (OPENBLAS_NUM_THREADS=1 keeps NumPy's away)"
        )


def main(channel_fd: int) -> int:
    """Serve as zygote on an inherited socket; the process's exit code."""
    settings = read_process_settings()
    configure_logging(
        component="worker", level=settings.log_level, log_format=settings.log_format, log_dir=settings.log_dir
    )
    channel = socket.socket(fileno=channel_fd)
    channel.set_inheritable(False)
    _prctl(_PR_SET_NAME, b"gp:zygote", 0, 0, 0)

    # Imported here and not above: the zygote's own code must stay loadable without the worker's libraries.
    from worker.slot import prepare_to_fork, run_worker
    from worker.spare import run_spare

    prepared = prepare_to_fork()
    gc.collect()
    gc.freeze()
    try:
        Zygote(channel, run_worker, prepared, run_spare).serve()
    except BrokenPipeError:
        pass  # the agent went away between two messages
    return 0


def _wake_only(signal_number: int, frame: FrameType | None) -> None:
    """Exists so that Python writes to the wake-up descriptor."""


def _drain(fd: int) -> None:
    try:
        while os.read(fd, 512):
            pass
    except BlockingIOError:
        return


def _resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
