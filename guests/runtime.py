"""Compiled guests at run time: engine, module, instance.

::

    engine = GuestEngine()                          # in the zygote, before fork
    engine.start_ticker()                           # in the worker
    module = engine.load(f"/proc/self/fd/{fd}")     # a sealed memory file whose bytes were verified
    with module.instantiate() as instance:          # memory is mapped copy-on-write out of that file
        instance.call("gp_resume", seed)

An instance that trapped is closed at once: its state is whatever the trap left. Pointers into guest memory never
leave this package; see :mod:`guests.memory`.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Mapping
from ctypes import byref, c_char, c_void_p
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, NamedTuple, NoReturn, Self

from guests import binding
from guests.compile import compile_module, new_engine
from guests.epoch_ticker import EpochTicker, deadline_ticks
from guests.errors import GuestContractError, GuestError, GuestIncompatible, GuestTrap
from guests.linker import RESULT_FORMATS, HostFunction, Linker, parameters_struct
from guests.memory import GuestMemory
from guests.module import MAX_TABLES
from guests.serving_host import serving_functions
from guests.signatures import EXPORTS

MEBIBYTE: Final = 1 << 20
REQUIRED_SEALS: Final = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
TRAP_INTERRUPT: Final = 10  # wasmtime_trap_code_enum of an expired epoch deadline


@dataclass(frozen=True, slots=True)
class InstanceLimits:
    """What one instance may take. ``call_deadline_ms`` counts only while the engine's ticker runs; ``result_bytes``
    is what the host copies of one result at most."""

    memory_bytes: int = 512 * MEBIBYTE
    table_elements: int = 65_536
    call_deadline_ms: int = 5_000
    result_bytes: int = 16 * MEBIBYTE


DEFAULT_LIMITS: Final = InstanceLimits()


class GuestEngine:
    """Wasmtime engine with the pinned configuration and the host functions of its guests.

    Create it before fork: it starts no thread until :meth:`start_ticker`. Shareable between threads.
    """

    def __init__(self, functions: Mapping[str, HostFunction] | None = None) -> None:
        """``functions`` answer the guests' imports; default: those of serving."""
        self._engine: int | None = new_engine()
        self.linker: Final = Linker(self._engine, serving_functions() if functions is None else functions)
        self._ticker = EpochTicker()

    @property
    def pointer(self) -> int:
        """The ``wasm_engine_t``.

        Raises:
            GuestContractError: the engine is closed.
        """
        if self._engine is None:
            raise GuestContractError("the guest engine is closed")
        return self._engine

    def load(self, path: str) -> GuestModule:
        """Map a compiled guest: O(1) in its size, and nothing is read that is not used.

        Requires: ``path`` is ``/proc/self/fd/N`` of a sealed memory file whose bytes the caller verified. They are
        native code, which Wasmtime runs as it finds it; and a later write or truncation would show through the
        mapping. The mapping outlives the descriptor.

        Raises:
            GuestIncompatible: made by another Wasmtime, configuration or CPU, or not a compiled module.
            GuestError: not a sealed memory file.
        """
        check_sealed(path)
        module = c_void_p()
        error = binding.module_deserialize_file(self.pointer, path.encode(), byref(module))
        binding.check(error, GuestIncompatible, "the compiled guest does not fit; build its snapshot again")
        assert module.value is not None  # set whenever there is no error
        return GuestModule(self, module.value)

    def compile(self, wasm: bytes) -> GuestModule:
        """Compile ``wasm`` in this process, for building snapshots; blocks for 5 ms to seconds.

        Raises:
            GuestModuleRefused: invalid WebAssembly.
        """
        return GuestModule(self, compile_module(self.pointer, wasm))

    def start_ticker(self) -> None:
        """Start the thread that lets call deadlines pass. Idempotent. Call it after fork, which no thread survives."""
        self._ticker.start(self.pointer)

    def close(self) -> None:
        """Stop the ticker and free the engine. Idempotent. Loaded modules keep what they need of it."""
        self._ticker.stop()
        self.linker.close()
        if self._engine is not None:
            binding.engine_delete(self._engine)
            self._engine = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_sealed(path: str) -> None:
    """
    Raises:
        GuestError: ``path`` is not a memory file whose bytes can never change.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:  # EINVAL: no memory file
        seals = 0
    finally:
        os.close(fd)
    if seals & REQUIRED_SEALS != REQUIRED_SEALS:
        raise GuestError(f"{path} is not a sealed memory file: compiled guests are loaded from nothing else")


class GuestModule:
    """A compiled guest, linked with its engine's host functions. Shareable between threads; closed by its owner."""

    def __init__(self, engine: GuestEngine, module: int) -> None:
        """Takes over ``module``, a ``wasmtime_module_t``."""
        self.engine: Final = engine  # keeps the host functions' callbacks alive
        self.checked_exports: Final[set[str]] = set()
        self._pre: int | None = None
        self._module: int | None = module
        try:
            self._pre = engine.linker.instantiate_pre(module)
        except BaseException:
            self.close()
            raise

    @property
    def pointer(self) -> int:
        """The ``wasmtime_instance_pre_t``.

        Raises:
            GuestContractError: the module is closed.
        """
        if self._pre is None:
            raise GuestContractError("the guest module is closed")
        return self._pre

    def instantiate(self, limits: InstanceLimits = DEFAULT_LIMITS) -> GuestInstance:
        """A fresh instance in the snapshotted state, about 20 us. The caller calls ``gp_resume`` and closes it.

        Raises:
            GuestContractError: it does not fit into ``limits``, or exports no memory.
        """
        return GuestInstance(self, limits)

    def close(self) -> None:
        """Free the module. Idempotent. Live instances keep what they need of it."""
        if self._pre is not None:
            binding.instance_pre_delete(self._pre)
            self._pre = None
        if self._module is not None:
            binding.module_delete(self._module)
            self._module = None


class _BoundExport(NamedTuple):
    function: Any  # byref(Function)
    pack: Any  # Struct.pack_into of the parameters
    unpack: Any  # Struct.unpack_from of the result, or None
    num_slots: int


class GuestInstance:
    """One sandboxed instance. One thread at a time; closed by its owner, and by any trap."""

    def __init__(self, module: GuestModule, limits: InstanceLimits = DEFAULT_LIMITS) -> None:
        self._module = module
        self._limits = limits
        self._deadline_ticks = deadline_ticks(limits.call_deadline_ms)
        self._exports: dict[str, _BoundExport] = {}
        self._slots = (c_char * (16 * binding.VAL_RAW_BYTES))()  # no function of the ABI has more parameters
        self._trap = c_void_p()
        self._trap_ref = byref(self._trap)
        self._instance = binding.Instance()
        self._store: int | None = binding.store_new(module.engine.pointer, None, None)
        self._context: int = binding.store_context(self._store)
        try:
            self._instantiate()
            memory = self.export("memory")
            if memory is None or memory.kind != binding.EXTERN_MEMORY:
                raise GuestContractError("the guest exports no memory")
            self.memory: Final = GuestMemory(self._context, memory.of.memory)
            module.engine.linker.memories[self._context] = self.memory
        except BaseException:
            self._delete_store()
            raise

    def _instantiate(self) -> None:
        limits = self._limits
        binding.store_limiter(self._store, limits.memory_bytes, limits.table_elements, 1, MAX_TABLES, 1)
        binding.context_set_epoch_deadline(self._context, self._deadline_ticks)
        error = binding.instance_pre_instantiate(
            self._module.pointer, self._context, byref(self._instance), self._trap_ref
        )
        binding.check(error, GuestContractError, "the guest cannot be instantiated")
        if self._trap.value:
            raise binding.take_trap(self._trap.value)

    @property
    def context(self) -> int:
        """The ``wasmtime_context_t``, for the snapshotter.

        Raises:
            GuestTrap: the instance is closed.
        """
        if self._store is None:
            raise GuestTrap("the guest instance is closed: it trapped, or its owner closed it")
        return self._context

    @property
    def is_closed(self) -> bool:
        """True after :meth:`close` or a trap."""
        return self._store is None

    def export(self, name: str) -> binding.Extern | None:
        """What the guest exports as ``name``; valid while the instance is open."""
        item = binding.Extern()
        encoded = name.encode()
        found = binding.instance_export_get(self.context, byref(self._instance), encoded, len(encoded), byref(item))
        return item if found else None

    def call(self, name: str, *arguments: int) -> int:
        """Call a function of the ABI: its result (i32 and i64 signed), or 0 if it has none. Under 2 us.

        Arguments of type i32 (pointers, lengths, handles) are unsigned, i64 are signed.

        Raises:
            GuestTrap: the guest trapped or passed its deadline, now or before; the instance is closed.
            GuestContractError: no such export, an argument out of range, or a host function refused the guest's
                arguments (which closes the instance too).
        """
        export = self._exports.get(name)
        if export is None:
            export = self._bind(name)
        try:
            export.pack(self._slots, 0, *arguments)
        except struct.error as error:
            raise GuestContractError(f"{name}{arguments}: {error}") from error
        binding.context_set_epoch_deadline(self._context, self._deadline_ticks)
        failed = binding.func_call_unchecked(
            self._context, export.function, self._slots, export.num_slots, self._trap_ref
        )
        if failed or self._trap.value:
            self._fail(name, failed)
        result: int = export.unpack(self._slots)[0] if export.unpack is not None else 0
        return result

    def call_unlisted(self, name: str) -> None:
        """Call an export without parameters or results that is not part of the ABI, for the snapshotter.

        Raises:
            GuestTrap: see :meth:`call`.
            GuestContractError: there is none, or its type is another.
        """
        item = self._function(name)
        if binding.function_kinds(self.context, item) != ((), ()):
            raise GuestContractError(f"export {name!r} has parameters or results")
        binding.context_set_epoch_deadline(self._context, self._deadline_ticks)
        failed = binding.func_call_unchecked(self._context, byref(item), self._slots, 1, self._trap_ref)
        if failed or self._trap.value:
            self._fail(name, failed)

    def _function(self, name: str) -> binding.Function:
        item = self.export(name)
        if item is None or item.kind != binding.EXTERN_FUNC:
            raise GuestContractError(f"the guest does not export the function {name}")
        return item.of.function

    def _bind(self, name: str) -> _BoundExport:
        signature = EXPORTS[name]
        function = self._function(name)
        if name not in self._module.checked_exports:  # an unchecked call with other types would be unsafe
            if binding.function_kinds(self._context, function) != (signature.params, signature.results):
                raise GuestContractError(f"export {name} is not {signature}")
            self._module.checked_exports.add(name)
        unpack = None if signature.result is None else struct.Struct("<" + RESULT_FORMATS[signature.result]).unpack_from
        num_slots = max(1, len(signature.params))
        export = _BoundExport(byref(function), parameters_struct(signature).pack_into, unpack, num_slots)
        self._exports[name] = export
        return export

    def _fail(self, name: str, error: int | None) -> NoReturn:
        trap = self._trap.value
        self._trap.value = None
        failure = binding.take_trap(trap) if trap else GuestTrap(binding.take_error(error or 0))
        raised = self._module.engine.linker.take_raised()
        self.close()
        if raised is not None:
            raise raised
        if failure.code == TRAP_INTERRUPT:
            limit_ms = self._limits.call_deadline_ms
            raise GuestTrap(f"{name} ran longer than its deadline of {limit_ms} ms", failure.code)
        raise GuestTrap(f"{name}: {failure}", failure.code)

    def read(self, pointer: int, size: int) -> bytes:
        """Copy of ``size`` bytes of guest memory.

        Raises:
            GuestContractError: out of range, or the instance is closed.
        """
        return self.memory.read(pointer, size)

    def write(self, pointer: int, data: bytes) -> None:
        """Copy ``data`` into guest memory.

        Raises:
            GuestContractError: out of range, or the instance is closed.
        """
        self.memory.write(pointer, data)

    def close(self) -> None:
        """Free the instance's memory. Idempotent."""
        self.memory.close()
        self._exports.clear()
        self._delete_store()

    def _delete_store(self) -> None:
        if self._store is not None:
            self._module.engine.linker.memories.pop(self._context, None)  # before another store may get that address
            binding.store_delete(self._store)
            self._store = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
