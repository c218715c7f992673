"""Hands untrusted WebAssembly to a process of its own and takes back what it made of it.

Task and reply are bytes in anonymous memory files, which are the child's standard input and output: nothing can block
on a full pipe, and the kernel bounds their size. The child runs :mod:`guests.confined_process` with an empty
environment, confines itself (:mod:`guests.confinement`), works off one task and ends. Whatever happens to it, a crash,
a limit, a reply that is no reply, is one :class:`GuestProcessError` here.

A message is u32 header length, the header (msgpack, strictly typed), then the attachments, whose sizes it holds. The
reply is the work of a process that ran hostile code: whoever uses it checks it (see :mod:`guests.initialise`).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Final

import msgspec

from guests.confinement import WorkLimits
from guests.errors import (
    GuestContractError,
    GuestError,
    GuestModuleRefused,
    GuestProcessError,
    GuestTrap,
    ProgramError,
)

LENGTH: Final = struct.Struct("<I")
MAX_HEADER_BYTES: Final = 64 << 20  # tensor names, and what a guest logged
MAX_ATTACHMENT_BYTES: Final = 2 << 30
MAX_SHOWN_BYTES: Final = 500  # of what a dying child wrote to its standard error
#: Errors that travel from the child; any other one is a bug, and its traceback goes to standard error.
ERRORS: Final[dict[str, type[GuestError]]] = {
    kind.__name__: kind
    for kind in (GuestError, GuestModuleRefused, GuestTrap, GuestContractError, GuestProcessError, ProgramError)
}


class CompileTask(msgspec.Struct, frozen=True, tag="compile"):
    """Compile the one attachment, a module."""

    sizes: tuple[int, ...]


class CompileComponentTask(msgspec.Struct, frozen=True, tag="compile-component"):
    """Compile the one attachment, a component."""

    sizes: tuple[int, ...]


class InitialiseTask(msgspec.Struct, frozen=True, tag="initialise"):
    """Run ``gp_init`` of the first attachment; the others are its assets, in the order of ``asset_names``."""

    sizes: tuple[int, ...]
    asset_names: tuple[str, ...]
    tensor_names: tuple[str, ...]


class DoneReply(msgspec.Struct, frozen=True, tag="done"):
    """Success of a compilation; the attachment is native code."""

    sizes: tuple[int, ...]
    layers: tuple[str, ...]


class InitialisedReply(msgspec.Struct, frozen=True, tag="initialised"):
    """Success of an initialisation; attachments: the baked module, then a program for each of ``program_kinds``, then
    the data of each of ``tensors`` (name, type, shape)."""

    sizes: tuple[int, ...]
    layers: tuple[str, ...]
    program_kinds: tuple[int, ...]
    tensor_handles: tuple[str, ...]
    log: tuple[tuple[int, str], ...]
    host_bytes: int
    tensors: tuple[tuple[str, int, tuple[int, ...]], ...] = ()


class FailedReply(msgspec.Struct, frozen=True, tag="failed"):
    """An error to raise in the parent."""

    sizes: tuple[int, ...]
    error: str
    message: str
    trap_code: int | None = None


Task = CompileTask | CompileComponentTask | InitialiseTask
Reply = DoneReply | InitialisedReply | FailedReply


def write_message(file: IO[bytes], header: Task | Reply, attachments: Sequence[bytes | memoryview]) -> None:
    """Write a message; ``header.sizes`` must be those of ``attachments``."""
    encoded = msgspec.msgpack.encode(header)
    file.write(LENGTH.pack(len(encoded)))
    file.write(encoded)
    for attachment in attachments:
        file.write(attachment)


def read_task(file: IO[bytes]) -> tuple[Task, list[bytes]]:
    """A task and its attachments, for the child."""
    header, attachments = _read_message(file, Task)
    assert isinstance(header, CompileTask | CompileComponentTask | InitialiseTask)  # the decoder made sure
    return header, attachments


def _read_message(file: IO[bytes], kind: Any) -> tuple[Any, list[bytes]]:
    """
    Raises:
        msgspec.MsgspecError: the header is not a ``kind``.
        ValueError: the message ends early, or its header is too long.
    """
    (length,) = LENGTH.unpack(_take(file, LENGTH.size))
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"header of {length} bytes")
    header = msgspec.msgpack.decode(_take(file, length), type=kind)
    return header, [_take(file, size) for size in header.sizes]


def _take(file: IO[bytes], size: int) -> bytes:
    data = file.read(size) if 0 <= size <= MAX_ATTACHMENT_BYTES else b""
    if len(data) != size:
        raise ValueError(f"{len(data)} of {size} bytes")
    return data


def run_confined(task: Task, attachments: Sequence[bytes], limits: WorkLimits) -> tuple[Reply, list[bytes]]:
    """Have ``task`` done by a confined process; blocks until it ended. Takes 0.1 s beyond the task itself.

    The reply is untrusted, except that its framing and types hold.

    Raises:
        GuestProcessError: it crashed, took longer or more than ``limits``, or its reply is malformed.
        GuestError: what the task itself raised, as itself.
    """
    with _memory_file("task") as given, _memory_file("reply") as made, _memory_file("errors") as said:
        write_message(given, task, attachments)
        given.flush()
        given.seek(0)
        status = _run_process(given, made, said, limits)
        if status != 0:
            raise GuestProcessError(_explain(status, said, limits))
        made.seek(0)
        try:
            reply, results = _read_message(made, Reply)
        except (ValueError, msgspec.MsgspecError) as error:
            raise GuestProcessError(f"the guest's confined process gave a malformed reply: {error}") from error
    if isinstance(reply, FailedReply):
        kind = ERRORS.get(reply.error, GuestProcessError)
        raise GuestTrap(reply.message, reply.trap_code) if kind is GuestTrap else kind(reply.message)
    return reply, results


def _memory_file(name: str) -> IO[bytes]:
    return os.fdopen(os.memfd_create(f"guest-{name}", os.MFD_CLOEXEC), "w+b")


def _run_process(given: IO[bytes], made: IO[bytes], said: IO[bytes], limits: WorkLimits) -> int:
    """Exit status as subprocess tells it: negative for a signal."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "guests.confined_process", msgspec.json.encode(limits).decode()],
        stdin=given,
        stdout=made,
        stderr=said,
        cwd="/",
        env=_environment(),
        start_new_session=True,
    )
    try:
        descriptor = os.pidfd_open(process.pid)
        try:
            waiter = select.poll()
            waiter.register(descriptor, select.POLLIN)
            is_over = bool(waiter.poll(limits.wall_s * 1000))
        finally:
            os.close(descriptor)
        if not is_over:
            raise GuestProcessError(f"the guest's confined process took longer than its {limits.wall_s:g} s")
        return process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):  # it is gone, as it should be
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _environment() -> dict[str, str]:
    """Nothing of ours: an environment may hold keys. Only what Python needs to find itself and this package."""
    environment = {"PYTHONPATH": str(Path(__file__).parent.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    if "LD_LIBRARY_PATH" in os.environ:
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    return environment


def _explain(status: int, said: IO[bytes], limits: WorkLimits) -> str:
    data_mib = limits.data_bytes >> 20
    match -status:
        case signal.SIGXCPU:
            return f"the guest's confined process used more than its {limits.cpu_s} s of CPU time"
        case signal.SIGABRT:
            reason = f"aborted (out of its {data_mib} MiB of memory?)"
        case signal.SIGKILL:
            reason = "was killed (out of memory, or of CPU time?)"
        case number if number > 0:
            name = next((known.name for known in signal.Signals if known == number), f"signal {number}")
            reason = f"crashed with {name}"
        case _:
            reason = f"ended with code {status}"
    said.seek(max(0, said.seek(0, os.SEEK_END) - MAX_SHOWN_BYTES))
    words = " ".join(said.read(MAX_SHOWN_BYTES).decode(errors="replace").split())
    return f"the guest's confined process {reason}" + (f": {words}" if words else "")
