"""Runs a guest's ``gp_init`` at build time and freezes the result.

The guest sees only deterministic imports: assets, tensor names and a log. No clock, no randomness, no model. What it
records and leaves in memory is therefore a function of its code and its assets.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from guests.abi import ABI_VERSION, ProgramKind
from guests.bake import START_EXPORT, bake, capture, prepare
from guests.errors import GuestContractError, ProgramError
from guests.linker import HostFunction
from guests.memory import GuestMemory
from guests.module import parse_guest
from guests.program import HEADER, MAX_OPERATIONS, OPERATION, decode_program
from guests.runtime import GuestEngine, GuestInstance, InstanceLimits

MAX_ASSET_NAME_BYTES: Final = 256
MAX_TENSOR_NAME_BYTES: Final = 1_024
MAX_LOG_LINES: Final = 1_000
MAX_LOG_LINE_BYTES: Final = 4_096
MAX_PROGRAM_BYTES: Final = HEADER.size + MAX_OPERATIONS * OPERATION.size
INIT_LIMITS: Final = InstanceLimits(call_deadline_ms=120_000)  # a vocabulary of 256 k tokens takes about 1 s


class LogLevel(IntEnum):
    """Levels of a guest's ``log``."""

    DEBUG = 0
    INFO = 1
    WARNING = 2
    ERROR = 3


@dataclass(frozen=True, slots=True)
class LogLine:
    """What a guest logged during its initialisation."""

    level: LogLevel
    text: str


@dataclass(frozen=True, slots=True)
class InitialisedGuest:
    """A guest after ``gp_init``. ``tensor_handles[h]`` is the name behind handle h of the programs, which were
    validated against it."""

    baked_wasm: bytes
    programs: dict[ProgramKind, bytes]
    tensor_handles: tuple[str, ...]
    has_tokenizer: bool
    log: tuple[LogLine, ...]


class _InitialisationHost:
    """The imports of a guest that is being initialised; closed for business once ``gp_init`` returned."""

    def __init__(self, assets: Mapping[str, bytes], tensor_names: Collection[str]) -> None:
        self._assets = assets
        self._tensor_names = frozenset(tensor_names)
        self.handles: dict[str, int] = {}
        self.programs: dict[ProgramKind, bytes] = {}
        self.lines: list[LogLine] = []

    def log(self, memory: GuestMemory, level: int, pointer: int, length: int) -> None:
        if len(self.lines) >= MAX_LOG_LINES:
            raise GuestContractError(f"the guest logged more than {MAX_LOG_LINES} lines")
        text = memory.read(pointer, min(length, MAX_LOG_LINE_BYTES)).decode(errors="replace")
        self.lines.append(LogLine(LogLevel(min(level, LogLevel.ERROR)), text))

    def asset_size(self, memory: GuestMemory, pointer: int, length: int) -> int:
        asset = self._assets.get(_read_name(memory, pointer, length, MAX_ASSET_NAME_BYTES))
        return -1 if asset is None else len(asset)

    def asset_read(
        self, memory: GuestMemory, pointer: int, length: int, offset: int, destination: int, size: int
    ) -> int:
        asset = self._assets.get(_read_name(memory, pointer, length, MAX_ASSET_NAME_BYTES))
        if asset is None:
            return -1
        if offset < 0:
            raise GuestContractError(f"asset_read at offset {offset}")
        data = asset[offset : offset + size]
        memory.write(destination, data)
        return len(data)

    def tensor(self, memory: GuestMemory, pointer: int, length: int) -> int:
        name = _read_name(memory, pointer, length, MAX_TENSOR_NAME_BYTES)
        if name not in self._tensor_names:
            return -1
        return self.handles.setdefault(name, len(self.handles))

    def program(self, memory: GuestMemory, pointer: int, length: int) -> int:
        if not HEADER.size <= length <= MAX_PROGRAM_BYTES:
            raise ProgramError(f"program of {length} bytes: expected {HEADER.size} to {MAX_PROGRAM_BYTES}")
        data = memory.read(pointer, length)
        number = HEADER.unpack_from(data)[2]
        if number not in list(ProgramKind):
            raise ProgramError(f"unknown program kind {number}")
        kind = ProgramKind(number)
        if kind in self.programs:
            raise ProgramError(f"the guest recorded its {kind.name} program twice")
        self.programs[kind] = data
        return 0


def _read_name(memory: GuestMemory, pointer: int, length: int, max_bytes: int) -> str:
    if length > max_bytes:
        raise GuestContractError(f"name of {length} bytes: at most {max_bytes}")
    try:
        return memory.read(pointer, length).decode()
    except UnicodeDecodeError as error:
        raise GuestContractError("a name is not UTF-8") from error


def initialise_guest(wasm: bytes, assets: Mapping[str, bytes], tensor_names: Collection[str]) -> InitialisedGuest:
    """Run ``gp_init`` and return the module in the state it left. Blocks: compiles, then runs for up to two minutes.

    Raises:
        GuestModuleRefused: the module breaks a rule of the ABI or of the snapshotter.
        GuestTrap: it trapped or took too long.
        GuestContractError: wrong ABI version, ``gp_init`` failed (its log is in the message), a program is missing,
            or it passed bad arguments.
        ProgramError: a recorded program is malformed.
    """
    module = parse_guest(wasm)
    host = _InitialisationHost(assets, tensor_names)
    functions: dict[str, HostFunction] = {
        "log": host.log,
        "asset_size": host.asset_size,
        "asset_read": host.asset_read,
        "tensor": host.tensor,
        "program": host.program,
    }
    with GuestEngine(functions) as engine:
        engine.start_ticker()
        compiled = engine.compile(prepare(module))
        try:
            with compiled.instantiate(INIT_LIMITS) as instance:
                if module.start is not None:
                    instance.call_unlisted(START_EXPORT)
                _run_init(instance, host)
                state = capture(module, instance)
        finally:
            compiled.close()
    for kind in ProgramKind:
        if kind not in host.programs:
            raise GuestContractError(f"gp_init recorded no {kind.name} program")
        decode_program(host.programs[kind], num_tensors=len(host.handles))
    return InitialisedGuest(
        bake(module, state), host.programs, tuple(host.handles), module.has_tokenizer, tuple(host.lines)
    )


def _run_init(instance: GuestInstance, host: _InitialisationHost) -> None:
    version = instance.call("gp_abi")
    if version != ABI_VERSION:
        raise GuestContractError(f"the guest speaks ABI version {version}, this glowplug {ABI_VERSION}")
    code = instance.call("gp_init")
    if code != 0:
        said = "; ".join(line.text for line in host.lines if line.level >= LogLevel.WARNING) or "nothing"
        raise GuestContractError(f"gp_init failed with code {code}; the guest logged: {said}")
