"""A spare: a worker of no model yet, with its device warm, that waits for an order on a channel of its own.

A wake that takes one skips the fork and the seconds of a warm-up: context, modules, matrix library, pinned ring and a
launch of every kernel. Its main thread sleeps in a read; when the agent closes the channel, it ends.
"""

from __future__ import annotations

import ctypes
import socket
import time
from typing import Final

import structlog

from worker.backends.choice import make_backend
from worker.slot import EXIT_OK, run_worker
from worker.spawn_order import EXIT_REPORTED, ForkSpare, SpareReady, SpareRefused, SpawnedFds, TakeOrder, choose_device
from worker.zygote_channel import PacketReader, encode_packet

_PR_SET_NAME: Final = 15
_prctl: Final = ctypes.CDLL(None).prctl


def run_spare(spare: ForkSpare, channel_fd: int, _forked_mono_ns: int) -> int:
    """Main function of a forked spare; its exit code, in the end that of the worker which it became.

    Requires: :func:`worker.slot.prepare_to_fork` ran before the fork. Takes over ``channel_fd``.
    """
    structlog.contextvars.bind_contextvars(spare_id=spare.spare_id)
    begin_s = time.monotonic()
    with socket.socket(fileno=channel_fd) as channel:
        choose_device(spare.device)
        backend = make_backend(spare.backend, spare.num_threads)
        try:
            backend.warm()
        except Exception as error:  # whatever it is: the agent tells it, and tries again later
            channel.sendall(encode_packet(SpareRefused(f"{type(error).__name__}: {error}")))
            return EXIT_REPORTED
        channel.sendall(encode_packet(SpareReady(round((time.monotonic() - begin_s) * 1000, 1))))
        taken = _wait_order(channel)
    if taken is None:
        return EXIT_OK
    order, fds = taken
    taken_mono_ns = time.monotonic_ns()
    structlog.contextvars.unbind_contextvars("spare_id")
    _prctl(_PR_SET_NAME, f"gp:{order.order.model}".encode()[:15], 0, 0, 0)
    return run_worker(order.order, fds, taken_mono_ns, backend)


def _wait_order(channel: socket.socket) -> tuple[TakeOrder, SpawnedFds] | None:
    """Sleep until there is an order; None: the agent does not need this spare any more."""
    reader: PacketReader[TakeOrder] = PacketReader(TakeOrder)
    while reader.receive(channel):
        for message, fds in reader.messages():
            return message, SpawnedFds(*fds)
    return None
