"""``python -m guests.confined_process LIMITS``: works off one task of :mod:`guests.confined_work` and ends.

Everything is imported before the process confines itself: afterwards no file can be opened. The confinement comes
before the first byte of the task is read.
"""

from __future__ import annotations

import os
import sys
from typing import IO, Final

import msgspec

from guests.compile import compile_in_process
from guests.confined_work import (
    CompileComponentTask,
    DoneReply,
    FailedReply,
    InitialisedReply,
    InitialiseTask,
    Reply,
    Task,
    read_task,
    write_message,
)
from guests.confinement import WorkLimits, confine
from guests.errors import GuestError, GuestProcessError, GuestTrap
from guests.initialisation import run_initialisation

OUT_OF_MEMORY: Final = "(os error 12)"  # as Rust prints ENOMEM


def perform(task: Task, attachments: list[bytes], layers: tuple[str, ...]) -> tuple[Reply, list[bytes]]:
    """Do ``task``.

    Raises:
        GuestError: what is wrong with the guest.
    """
    if isinstance(task, InitialiseTask):
        wasm, *assets = attachments
        attachments.clear()  # memory is limited: whoever can lets go
        made = run_initialisation(wasm, dict(zip(task.asset_names, assets, strict=True)), task.tensor_names)
        results = [made.baked_wasm, *made.programs.values(), *(bytes(tensor.data) for tensor in made.tensors)]
        reply = InitialisedReply(
            sizes=tuple(len(result) for result in results),
            layers=layers,
            program_kinds=tuple(kind.value for kind in made.programs),
            tensor_handles=made.tensor_handles,
            log=tuple((line.level.value, line.text) for line in made.log),
            host_bytes=made.host_bytes,
            tensors=tuple((tensor.name, tensor.dtype.value, tensor.shape) for tensor in made.tensors),
        )
        return reply, results
    code = compile_in_process(attachments.pop(), is_component=isinstance(task, CompileComponentTask))
    return DoneReply(sizes=(len(code),), layers=layers), [code]


def describe_failure(error: GuestError | MemoryError, limits: WorkLimits) -> FailedReply:
    """What the parent is to raise. Wasmtime tells of a failed allocation as of any refusal; it is a limit of ours."""
    if isinstance(error, MemoryError) or OUT_OF_MEMORY in str(error):
        message = f"the guest needs more than {limits.data_bytes >> 20} MiB of memory to be built"
        return FailedReply((), GuestProcessError.__name__, message)
    code = error.code if isinstance(error, GuestTrap) else None
    return FailedReply((), type(error).__name__, str(error), code)


def main() -> int:
    """Confine, read, perform, reply; the exit code."""
    limits = msgspec.json.decode(sys.argv[1], type=WorkLimits)
    layers = confine(limits)
    results: list[bytes] = []
    reply: Reply
    try:
        task, attachments = read_task(sys.stdin.buffer)
        reply, results = perform(task, attachments, layers)
    except (GuestError, MemoryError) as error:
        reply = describe_failure(error, limits)
    output: IO[bytes] = sys.stdout.buffer
    write_message(output, reply, results)
    output.flush()
    return 0


if __name__ == "__main__":
    code = main()
    os._exit(code)  # nothing to tidy up: the memory goes with the process
