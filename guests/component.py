"""Python guests: components made by ``componentize-py``, compiled ahead of time, restored and confined like the others.

A Python guest post-processes finished text (``examples/python_postprocess``). Its interpreter and its modules were
initialised when the component was built, so restoring one takes a millisecond; nothing of it is captured here. It is
second class on purpose: no tokeniser, no programs, 33 MB of machine code.

The same rules hold as for modules in C: screened by our own parser, compiled by a confined process, loaded only from
sealed memory, nothing linked but ``log``, every call with a deadline, memory, tables and instances limited, a trap ends
the call and the next one starts from the restored state.

The wheel's Python package is used here, and only here, for the canonical ABI's strings. It takes 50 ms to import, which
happens with the first engine.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self

from guests import binding
from guests.compile import COMPILE_LIMITS, new_engine
from guests.component_format import parse_component
from guests.confined_work import CompileComponentTask, DoneReply, run_confined
from guests.confinement import WorkLimits
from guests.epoch_ticker import EpochTicker, deadline_ticks
from guests.errors import (
    GuestContractError,
    GuestError,
    GuestIncompatible,
    GuestModuleRefused,
    GuestProcessError,
    GuestTrap,
)
from guests.guest_log import LogLevel
from guests.runtime import MEBIBYTE, TRAP_INTERRUPT, InstanceLimits, check_sealed
from guests.serving_host import ServingLog

HOST_INTERFACE: Final = "glowplug:python-guest/host@0.1.0"
RESUME: Final = "resume"
POST_PROCESS: Final = "post-process"
COMPONENT_LIMITS: Final = InstanceLimits(memory_bytes=256 * MEBIBYTE, result_bytes=4 * MEBIBYTE)
MAX_CORE_INSTANCES: Final = 64  # interpreter, its libraries and the glue between them: componentize-py 0.25 makes 45
MAX_CORE_TABLES: Final = 16
INTERRUPT_MESSAGE: Final = "wasm trap: interrupt"
MASK_64: Final = 0xFFFF_FFFF_FFFF_FFFF


def compile_component(component: bytes, *, limits: WorkLimits = COMPILE_LIMITS) -> bytes:
    """Machine code of a Python guest, for :meth:`ComponentEngine.load`. Takes seconds: an interpreter is compiled.

    Raises:
        GuestModuleRefused: it imports more than ``log``, lacks an export, or does not validate.
        GuestProcessError: the compiler crashed or ran into ``limits``.
    """
    outline = parse_component(component)
    foreign = sorted(set(outline.imports) - {HOST_INTERFACE})
    if foreign:
        raise GuestModuleRefused(
            f"the component imports {', '.join(foreign[:5])}: a Python guest imports only {HOST_INTERFACE}; "
            "build it with componentize-py's --stub-wasi"
        )
    missing = {RESUME, POST_PROCESS} - set(outline.exports)
    if missing:
        raise GuestModuleRefused(f"the component does not export {', '.join(sorted(missing))}")
    reply, attachments = run_confined(CompileComponentTask((len(component),)), [component], limits)
    if not isinstance(reply, DoneReply) or len(attachments) != 1:
        raise GuestProcessError("the guest's confined process gave the reply of another task")
    return attachments[0]


class ComponentEngine:
    """Engine and linker of Python guests. Create it before fork; it starts no thread until :meth:`start_ticker`."""

    def __init__(self, log: Callable[[int, str], None] | None = None) -> None:
        """``log(level, text)`` hears each line; default: as :mod:`guests.serving_host`, without the text."""
        import wasmtime  # 50 ms that only Python guests need
        from wasmtime import _ffi, component

        self._wasmtime, self._component = wasmtime, component
        serving_log = ServingLog()
        self._log = log or (lambda level, text: serving_log(None, level, 0, len(text)))
        self._ticker = EpochTicker()
        self._pointer = new_engine(is_component=True)
        engine = wasmtime.Engine.__new__(wasmtime.Engine)  # the package's own Config cannot say all that ours does
        engine._set_ptr(ctypes.cast(self._pointer, ctypes.POINTER(_ffi.wasm_engine_t)))
        self._engine: Any = engine
        self._linker: Any = component.Linker(engine)
        with self._linker.root() as root, root.add_instance(HOST_INTERFACE) as host:
            host.add_func("log", self._hear)

    def _hear(self, _store: object, level: int, message: str) -> None:
        if level > LogLevel.ERROR:
            raise GuestContractError(f"log level {level}: expected 0 to {LogLevel.ERROR.value}")
        self._log(level, message)

    def start_ticker(self) -> None:
        """See :meth:`guests.runtime.GuestEngine.start_ticker`."""
        self._ticker.start(self._pointer)

    def load(self, path: str) -> Any:
        """Map a compiled component: O(1) in its size. ``path`` as for :meth:`guests.runtime.GuestEngine.load`.

        Raises:
            GuestIncompatible: made by another Wasmtime, configuration or CPU.
            GuestError: not a sealed memory file.
        """
        check_sealed(path)
        try:
            return self._component.Component.deserialize_file(self._engine, path)
        except self._wasmtime.WasmtimeError as error:
            raise GuestIncompatible(f"the compiled component does not fit: {binding.one_line(str(error))}") from error

    def instantiate(self, component: Any, limits: InstanceLimits) -> tuple[Any, Any]:
        """A store and an instance in it.

        Raises:
            GuestContractError: it does not fit into ``limits``.
        """
        store = self._wasmtime.Store(self._engine)
        store.set_limits(limits.memory_bytes, limits.table_elements, MAX_CORE_INSTANCES, MAX_CORE_TABLES, 1)
        store.set_epoch_deadline(deadline_ticks(limits.call_deadline_ms))
        try:
            return store, self._linker.instantiate(store, component)
        except (self._wasmtime.WasmtimeError, self._wasmtime.Trap) as error:
            store.close()
            raise GuestContractError(f"the guest cannot be instantiated: {binding.one_line(str(error))}") from error

    def failure(self, name: str, error: BaseException, limits: InstanceLimits) -> GuestError | None:
        """The error of ours for what a call raised; None: it is not the guest's doing."""
        if not isinstance(error, self._wasmtime.WasmtimeError | self._wasmtime.Trap):
            return error if isinstance(error, GuestError) else None
        message = str(error)  # a component's traps come as errors without a code
        if INTERRUPT_MESSAGE in message:
            return GuestTrap(f"{name} ran longer than its deadline of {limits.call_deadline_ms} ms", TRAP_INTERRUPT)
        return GuestTrap(f"{name}: {binding.one_line(message)}")

    def close(self) -> None:
        """Stop the ticker and free the engine. Idempotent. Requires: its post-processors are closed."""
        self._ticker.stop()
        self._linker.close()
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class PostProcessor:
    """One restored Python guest. One thread at a time; closed by its owner.

    A trap, a deadline or an uncaught Python exception drops the instance; the next call works on a fresh one.
    """

    def __init__(
        self, engine: ComponentEngine, component: Any, seed: int, limits: InstanceLimits = COMPONENT_LIMITS
    ) -> None:
        """
        Raises:
            GuestTrap: ``resume`` raised.
            GuestContractError: it does not fit into ``limits``, or its exports have other types.
        """
        self._engine = engine
        self._module = component
        self._seed = seed & MASK_64
        self._limits = limits
        self._store: Any = None
        self._function: Any = None
        self._is_closed = False
        self._resume()

    def _resume(self) -> None:
        self._store, instance = self._engine.instantiate(self._module, self._limits)
        try:
            resume = self._export(instance, RESUME, ["U64"], None)
            self._function = self._export(instance, POST_PROCESS, ["String"], "String")
            self._call(RESUME, resume, self._seed)
        except BaseException:
            self._drop()
            raise

    def _export(self, instance: Any, name: str, params: list[str], result: str | None) -> Any:
        """An export whose type was compared: the package converts by the type that the *guest* declares."""
        function = instance.get_func(self._store, name)
        if function is None:
            raise GuestContractError(f"the component does not export the function {name}")
        declared = function.type(self._store)
        kinds = [type(kind).__name__ for _, kind in declared.params]
        returned = None if declared.result is None else type(declared.result).__name__
        if kinds != params or returned != result:
            raise GuestContractError(
                f"export {name} is ({', '.join(kinds)}) -> {returned}: expected {params}, {result}"
            )
        return function

    def _call(self, name: str, function: Any, argument: int | str) -> Any:
        self._store.set_epoch_deadline(deadline_ticks(self._limits.call_deadline_ms))
        try:
            result = function(self._store, argument)
            function.post_return(self._store)
        except BaseException as error:
            failure = self._engine.failure(name, error, self._limits)
            self._drop()
            if failure is None or failure is error:
                raise
            raise failure from error
        return result

    def post_process(self, text: str) -> str:
        """The text to send out for ``text`` (lone surrogates become U+FFFD).

        Raises:
            GuestTrap: it raised, trapped or took too long.
            GuestContractError: its answer is larger than the limits allow, or it is closed.
        """
        if self._is_closed:
            raise GuestContractError("the post-processor is closed")
        if self._store is None:
            self._resume()
        clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        result: str = self._call(POST_PROCESS, self._function, clean)
        size_bytes = len(result.encode())
        if size_bytes > self._limits.result_bytes:
            self._drop()
            raise GuestContractError(
                f"{POST_PROCESS}: a text of {size_bytes} bytes: at most {self._limits.result_bytes}"
            )
        return result

    def _drop(self) -> None:
        store, self._store, self._function = self._store, None, None
        if store is not None:
            store.close()

    def close(self) -> None:
        """Free the instance. Idempotent."""
        self._is_closed = True
        self._drop()
