"""Runs a guest's ``gp_init`` at build time, in a confined process, and freezes the result.

The module is parsed here first, so that what our own rules refuse never reaches Wasmtime. The confined process
compiles it, runs it and captures its state (:mod:`guests.initialisation`). It ran hostile code, perhaps: what it hands
back is checked here as if the guest's author had written it, and compiled by yet another process.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from guests.abi import PROGRAM_SETS, ProgramKind, TensorType
from guests.confined_work import InitialisedReply, InitialiseTask, run_confined
from guests.confinement import WorkLimits
from guests.errors import GuestContractError, GuestModuleRefused, GuestProcessError, ProgramError
from guests.guest_log import LogLevel as LogLevel
from guests.guest_log import LogLine as LogLine
from guests.guest_tensors import GuestTensor, check_tensors
from guests.module import MAX_BAKED_BYTES, parse_guest
from guests.program import decode_program

#: Two minutes for ``gp_init`` itself (a vocabulary of 256 k tokens takes about 1 s), the rest for compiling.
INITIALISE_LIMITS: Final = WorkLimits(wall_s=300.0, cpu_s=300)


@dataclass(frozen=True, slots=True)
class InitialisedGuest:
    """A guest after ``gp_init``. ``tensor_handles[h]`` is the name behind handle h of the programs, which were
    validated against it. ``host_bytes``: what the host kept on the guest's behalf (names, programs, log).
    ``tensors``: what it allocated and filled, behind handles of their names."""

    baked_wasm: bytes
    programs: dict[ProgramKind, bytes]
    tensor_handles: tuple[str, ...]
    has_tokenizer: bool
    log: tuple[LogLine, ...]
    host_bytes: int = 0
    tensors: tuple[GuestTensor, ...] = ()


def initialise_guest(
    wasm: bytes,
    assets: Mapping[str, bytes],
    tensor_names: Collection[str],
    *,
    limits: WorkLimits = INITIALISE_LIMITS,
) -> InitialisedGuest:
    """Run ``gp_init`` and return the module in the state it left. Blocks for up to ``limits.wall_s``.

    Raises:
        GuestModuleRefused: the module breaks a rule of the ABI or of the snapshotter.
        GuestTrap: it trapped or took too long.
        GuestContractError: wrong ABI version, ``gp_init`` failed (its log is in the message), a program is missing,
            or it passed bad arguments.
        ProgramError: a recorded program is malformed.
        GuestProcessError: the confined process crashed or ran into ``limits``.
    """
    parse_guest(wasm)
    task = InitialiseTask(
        sizes=(len(wasm), *(len(asset) for asset in assets.values())),
        asset_names=tuple(assets),
        tensor_names=tuple(tensor_names),
    )
    reply, attachments = run_confined(task, [wasm, *assets.values()], limits)
    if not isinstance(reply, InitialisedReply) or len(attachments) != 1 + len(reply.program_kinds) + len(reply.tensors):
        raise GuestProcessError("the guest's confined process gave the reply of another task")
    return _check_reply(reply, attachments, frozenset(tensor_names))


def _check_reply(reply: InitialisedReply, attachments: list[bytes], tensor_names: frozenset[str]) -> InitialisedGuest:
    """
    Raises:
        GuestProcessError: the reply is not one that an honest process gives.
    """
    baked_wasm, *recorded = attachments[: 1 + len(reply.program_kinds)]
    handles = reply.tensor_handles
    made = {name for name, _, _ in reply.tensors}
    known = made.isdisjoint(tensor_names) and made.issubset(handles) and (tensor_names | made).issuperset(handles)
    if not known or len(set(handles)) != len(handles):
        raise GuestProcessError("the guest's confined process invented tensor handles")
    try:
        module = parse_guest(baked_wasm, max_bytes=MAX_BAKED_BYTES)
        if module.start is not None:
            raise GuestModuleRefused("a baked guest has no start function")
        programs = {ProgramKind(kind): data for kind, data in zip(reply.program_kinds, recorded, strict=True)}
        if frozenset(programs) not in PROGRAM_SETS:
            raise ProgramError(f"programs of kinds {sorted(programs)}")
        for kind, program in programs.items():
            if decode_program(program, num_tensors=len(handles)).kind is not kind:
                raise ProgramError(f"the {kind.name} program is of another kind")
        tensors = tuple(
            GuestTensor(name, TensorType(dtype), shape, data)
            for (name, dtype, shape), data in zip(reply.tensors, attachments[1 + len(recorded) :], strict=True)
        )
        check_tensors(tensors)
        log = tuple(LogLine(LogLevel(level), text) for level, text in reply.log)
    except (GuestModuleRefused, GuestContractError, ProgramError, KeyError, ValueError) as error:
        raise GuestProcessError(f"the guest's confined process gave a result that cannot be: {error!r}") from error
    return InitialisedGuest(baked_wasm, programs, handles, module.has_tokenizer, log, reply.host_bytes, tensors)
