"""``python -m worker releaser FD``: the helper that has the driver take workers off their GPUs (T3r), and back.

A process of its own, since libcuda must be in neither agent nor zygote. It serves the listening socket ``FD``, a
thread for each caller, and acts on the caller's own process only, which the kernel names. First it prints one line,
whether the driver can; it ends when its standard input does.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from typing import Final

import msgspec

from worker.backends.cuda.checkpoint import CheckpointRefused, DriverCheckpoint, probe_checkpoint
from worker.device_release import PEER_CREDENTIALS, RESUME, SUSPEND, Probed, ReleaseAnswer

MAX_CALLERS: Final = 64
ORDER_LIMIT_S: Final = 5.0
_BAD_ORDER: Final = 1  # CUDA_ERROR_INVALID_VALUE
_LIBRARY: Final = "GLOWPLUG_DRIVER_LIBRARY"  # for tests; libcuda otherwise


def main(listener_fd: int) -> int:
    """Serve until standard input ends; exit code."""
    library = os.environ.get(_LIBRARY)
    found = probe_checkpoint(library) if library else probe_checkpoint()
    reason = found if isinstance(found, str) else ""
    sys.stdout.buffer.write(msgspec.json.encode(Probed(reason)) + b"\n")
    sys.stdout.flush()
    if isinstance(found, str):
        return 0
    listener = socket.socket(fileno=listener_fd)
    threading.Thread(target=serve, args=(listener, found), name="accept", daemon=True).start()
    sys.stdin.buffer.read()
    os._exit(0)  # threads may be within the driver


def serve(listener: socket.socket, checkpoint: DriverCheckpoint) -> None:
    """Answer callers for ever."""
    room = threading.BoundedSemaphore(MAX_CALLERS)
    while True:
        room.acquire()
        connection, _ = listener.accept()
        threading.Thread(target=_answer, args=(connection, checkpoint, room), daemon=True).start()


def _answer(connection: socket.socket, checkpoint: DriverCheckpoint, room: threading.BoundedSemaphore) -> None:
    try:
        with connection:
            connection.settimeout(ORDER_LIMIT_S)
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER_CREDENTIALS.size)
            pid, uid, _ = PEER_CREDENTIALS.unpack(credentials)
            order = connection.recv(64).decode("ascii", "replace").strip()
            answer = _carry_out(order, pid, uid, checkpoint)
            connection.sendall(msgspec.json.encode(answer) + b"\n")
    except OSError:
        pass  # the caller has gone, and its memory with it
    finally:
        room.release()


def _carry_out(order: str, pid: int, uid: int, checkpoint: DriverCheckpoint) -> ReleaseAnswer:
    if uid != os.getuid() or order not in (SUSPEND, RESUME):
        return ReleaseAnswer(_BAD_ORDER, f"no order for user {uid}: expected {SUSPEND} or {RESUME}, from this user")
    try:
        (checkpoint.suspend if order == SUSPEND else checkpoint.resume)(pid)
    except CheckpointRefused as error:
        return ReleaseAnswer(error.status, str(error))
    return ReleaseAnswer(0)
