"""The inside of an initialisation: host functions, ``gp_init``, capture, bake. Runs in a confined process.

The guest sees only deterministic imports: assets, tensor names and a log. No clock, no randomness, no model. What it
records and leaves in memory is therefore a function of its code and its assets.

Pointers and lengths are checked before a host function runs, from the ABI's table (:mod:`guests.linker`); the functions
here check what the table cannot know, and count what the host keeps for the guest.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from guests.abi import ABI_VERSION, PROGRAM_SETS, ProgramKind
from guests.bake import START_EXPORT, bake, capture, prepare
from guests.errors import GuestContractError, ProgramError
from guests.guest_log import LogLevel, LogLine
from guests.guest_tensors import GuestTensor, GuestTensors
from guests.linker import HostFunction
from guests.memory import GuestMemory
from guests.module import parse_guest
from guests.program import HEADER, MAX_OPERATIONS, OPERATION, decode_program
from guests.runtime import GuestEngine, GuestInstance, InstanceLimits

MAX_ASSET_NAME_BYTES: Final = 256
MAX_TENSOR_NAME_BYTES: Final = 1_024
MAX_SHAPE_BYTES: Final = 32
MAX_LOG_LINES: Final = 1_000
MAX_LOG_LINE_BYTES: Final = 4_096
MAX_PROGRAM_BYTES: Final = HEADER.size + MAX_OPERATIONS * OPERATION.size
MAX_HOST_BYTES: Final = 16 << 20
INIT_LIMITS: Final = InstanceLimits(call_deadline_ms=120_000)


@dataclass(frozen=True, slots=True)
class Initialisation:
    """What an initialisation made; see :class:`guests.initialise.InitialisedGuest`."""

    baked_wasm: bytes
    programs: dict[ProgramKind, bytes]
    tensor_handles: tuple[str, ...]
    log: tuple[LogLine, ...]
    host_bytes: int
    tensors: tuple[GuestTensor, ...]


class InitialisationHost:
    """The imports of a guest that is being initialised."""

    def __init__(self, assets: Mapping[str, bytes], tensor_names: Collection[str]) -> None:
        self._assets = assets
        self._tensor_names = frozenset(tensor_names)
        self.handles: dict[str, int] = {}
        self.tensors = GuestTensors()
        self.programs: dict[ProgramKind, bytes] = {}
        self.lines: list[LogLine] = []
        self.host_bytes = 0

    def functions(self) -> dict[str, HostFunction]:
        """By import name."""
        return {
            "log": self.log,
            "asset_size": self.asset_size,
            "asset_read": self.asset_read,
            "tensor": self.tensor,
            "tensor_alloc": self.tensor_alloc,
            "tensor_write": self.tensor_write,
            "program": self.program,
        }

    def _keep(self, size_bytes: int) -> None:
        """Count what is kept for the guest."""
        self.host_bytes += size_bytes
        if self.host_bytes > MAX_HOST_BYTES:
            raise GuestContractError(f"the guest made the host keep more than {MAX_HOST_BYTES} bytes")

    def log(self, memory: GuestMemory, level: int, pointer: int, length: int) -> None:
        if level > LogLevel.ERROR:
            raise GuestContractError(f"log level {level}: expected 0 to {LogLevel.ERROR.value}")
        if len(self.lines) >= MAX_LOG_LINES:
            raise GuestContractError(f"the guest logged more than {MAX_LOG_LINES} lines")
        data = memory.read(pointer, min(length, MAX_LOG_LINE_BYTES))
        self._keep(len(data))
        self.lines.append(LogLine(LogLevel(level), data.decode(errors="replace")))

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
        if name in self.handles:
            return self.handles[name]
        return self._add_handle(name, length) if name in self._tensor_names else -1

    def _add_handle(self, name: str, length: int) -> int:
        self._keep(length)
        handle = self.handles[name] = len(self.handles)
        return handle

    def tensor_alloc(
        self, memory: GuestMemory, pointer: int, length: int, dtype: int, shape: int, shape_bytes: int
    ) -> int:
        name = _read_name(memory, pointer, length, MAX_TENSOR_NAME_BYTES)
        if name in self._tensor_names or name in self.handles:
            return -1
        if shape_bytes > MAX_SHAPE_BYTES:
            raise GuestContractError(f"tensor_alloc: a shape of {shape_bytes} bytes: at most {MAX_SHAPE_BYTES}")
        self.tensors.allocate(len(self.handles), name, dtype, memory.read(shape, shape_bytes))
        return self._add_handle(name, length)

    def tensor_write(self, memory: GuestMemory, handle: int, offset: int, pointer: int, length: int) -> int:
        self.tensors.write(handle, offset, memory.read(pointer, length))
        return 0

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
        self._keep(length)
        self.programs[kind] = data
        return 0


def _read_name(memory: GuestMemory, pointer: int, length: int, max_bytes: int) -> str:
    if length > max_bytes:
        raise GuestContractError(f"name of {length} bytes: at most {max_bytes}")
    try:
        return memory.read(pointer, length).decode()
    except UnicodeDecodeError as error:
        raise GuestContractError("a name is not UTF-8") from error


def run_initialisation(wasm: bytes, assets: Mapping[str, bytes], tensor_names: Collection[str]) -> Initialisation:
    """Compile ``wasm``, run ``gp_init`` and bake the state it left, in this process: see
    :func:`guests.initialise.initialise_guest` for one that protects the caller from the module.

    Raises:
        GuestModuleRefused, GuestTrap, GuestContractError, ProgramError: as there.
    """
    module = parse_guest(wasm)
    host = InitialisationHost(assets, tensor_names)
    with GuestEngine(host.functions()) as engine:
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
    _check_programs(host)
    return Initialisation(
        bake(module, state),
        host.programs,
        tuple(host.handles),
        tuple(host.lines),
        host.host_bytes,
        host.tensors.made,
    )


def _check_programs(host: InitialisationHost) -> None:
    recorded = frozenset(host.programs)
    if ProgramKind.ENCODE in recorded and len(recorded) > 1:
        raise GuestContractError("gp_init recorded an ENCODE program beside others: a model encodes or generates")
    if recorded not in PROGRAM_SETS:
        missing = next(kind for kind in ProgramKind if kind not in recorded)
        raise GuestContractError(f"gp_init recorded no {missing.name} program")
    for program in host.programs.values():
        decode_program(program, num_tensors=len(host.handles))


def _run_init(instance: GuestInstance, host: InitialisationHost) -> None:
    version = instance.call("gp_abi")
    if version != ABI_VERSION:
        raise GuestContractError(f"the guest speaks ABI version {version}, this glowplug {ABI_VERSION}")
    code = instance.call("gp_init")
    if code != 0:
        said = "; ".join(line.text for line in host.lines if line.level >= LogLevel.WARNING) or "nothing"
        raise GuestContractError(f"gp_init failed with code {code}; the guest logged: {said}")
