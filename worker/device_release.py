"""A worker's side of leaving its GPU altogether (T3r): it asks a helper of its agent, which asks the driver.

The driver takes a process off its devices only for another process. The helper (:mod:`worker.releaser`) learns from
the kernel who asks, so that a worker can be asked for by itself alone. One connection an order; the helper may be
started anew between two, and the socket, which is the agent's, keeps whoever comes meanwhile.
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct
import time
from typing import Final

import msgspec
import structlog

from worker.backends.protocol import BackendError, BackendFull, BackendLost

SUSPEND, RESUME = "suspend", "resume"
#: What the driver calls a full device. Source: CUDA Driver API, ``CUDA_ERROR_OUT_OF_MEMORY``.
OUT_OF_MEMORY: Final = 2
#: A worker has next to nothing on its device when it leaves, and nobody waits.
SUSPEND_LIMIT_S: Final = 30.0
#: A request waits. Past it the worker ends, and the request goes on elsewhere.
RESUME_LIMIT_S: Final = 20.0
MAX_ANSWER_BYTES: Final = 4096
PEER_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid
_PR_SET_PTRACER: Final = 0x59616D61
_prctl: Final = ctypes.CDLL(None).prctl


class ReleaseAnswer(msgspec.Struct, frozen=True):
    """What came of an order. ``status``: the driver's, 0 where it did as asked."""

    status: int
    error: str = ""


class Probed(msgspec.Struct, frozen=True):
    """The helper's first line. ``reason`` says why the driver cannot; empty: it can."""

    reason: str = ""


class DriverRelease:
    """See :class:`worker.engine.parking.ProcessRelease`. One thread at a time."""

    def __init__(
        self, address: str, suspend_limit_s: float = SUSPEND_LIMIT_S, resume_limit_s: float = RESUME_LIMIT_S
    ) -> None:
        """``address`` is of an abstract socket, without its leading zero byte."""
        self._address = address
        self._suspend_limit_s = suspend_limit_s
        self._resume_limit_s = resume_limit_s

    def suspend(self) -> None:
        """Give up all of this process's device memory; every call of the device would block from now on.

        Raises:
            BackendError: refused; the device is as it was.
            BackendLost: nobody knows how the device is.
        """
        try:
            answer = self._ask(SUSPEND, self._suspend_limit_s)
        except ConnectionRefusedError as error:
            raise BackendError("nobody on this node takes processes off their devices") from error
        except (OSError, msgspec.DecodeError) as error:
            self._resume_unknown(error)
            raise BackendError(f"the helper ended while it did so ({_name(error)}); undone") from error
        if answer.status:
            raise BackendError(answer.error)

    def resume(self) -> None:
        """Have it back.

        Raises:
            BackendFull: no room on the device; as it was.
            BackendLost: it cannot come back.
        """
        deadline_s = time.monotonic() + self._resume_limit_s
        while True:
            try:
                answer = self._ask(RESUME, max(0.01, deadline_s - time.monotonic()))
                break
            except (OSError, msgspec.DecodeError) as error:  # the next helper finds the process where this one left it
                if isinstance(error, ConnectionRefusedError) or time.monotonic() >= deadline_s:
                    message = f"the driver did not fetch this process within {self._resume_limit_s:g} s: {_name(error)}"
                    raise BackendLost(message) from error
        if answer.status == OUT_OF_MEMORY:
            raise BackendFull(answer.error)
        if answer.status:
            raise BackendLost(answer.error)

    def _resume_unknown(self, cause: Exception) -> None:
        """After an order that nobody answered. Raises BackendLost where the driver itself hangs."""
        if isinstance(cause, TimeoutError):
            message = f"the driver did not take this process off its device within {self._suspend_limit_s:g} s"
            raise BackendLost(message) from cause
        try:
            self.resume()
        except BackendFull as error:
            raise BackendLost(str(error)) from error

    def _ask(self, order: str, limit_s: float) -> ReleaseAnswer:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(limit_s)
            connection.connect("\0" + self._address)
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER_CREDENTIALS.size)
            agent_pid, _, _ = PEER_CREDENTIALS.unpack(credentials)
            with contextlib.suppress(OSError):
                _prctl(_PR_SET_PTRACER, agent_pid, 0, 0, 0)  # Yama: it and its children may; elsewhere without effect
            connection.sendall(order.encode() + b"\n")
            received = b""
            while not received.endswith(b"\n") and len(received) < MAX_ANSWER_BYTES:
                part = connection.recv(MAX_ANSWER_BYTES)
                if not part:
                    raise ConnectionResetError("no answer")
                received += part
            return msgspec.json.decode(received, type=ReleaseAnswer)


def connect_release(address: str) -> DriverRelease | None:
    """The way to leave the device; None, with a line in the log: there is none here, and the model is parked (T3)."""
    if address:
        return DriverRelease(address)
    structlog.get_logger().warning("release_unavailable", instead="T3", remedy="see the agent's log at its start")
    return None


def _name(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
