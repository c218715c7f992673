"""Host functions: what a guest may import, defined over the unchecked C ABI.

Values arrive as an array of 16-byte slots that results overwrite; packing them with :mod:`struct` makes a host call
four to eight times cheaper than the wheel's checked path.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Mapping
from ctypes import byref, c_void_p
from struct import Struct
from typing import Final

from guests import binding
from guests.abi import IMPORT_NAMESPACE
from guests.errors import GuestContractError, GuestError
from guests.memory import GuestMemory
from guests.signatures import IMPORTS, Signature

# A host function gets the caller's memory and its arguments (i32 unsigned, i64 signed).
HostFunction = Callable[..., int | None]

PARAMETER_FORMATS: Final = {binding.KIND_I32: "I12x", binding.KIND_I64: "q8x"}
RESULT_FORMATS: Final = {binding.KIND_I32: "i", binding.KIND_I64: "q"}


def parameters_struct(signature: Signature) -> Struct:
    """Layout of the parameters in the slots."""
    return Struct("<" + "".join(PARAMETER_FORMATS[kind] for kind in signature.params))


class Linker:
    """The host functions of one engine; every import of the ABI must be given. Closed by its owner."""

    def __init__(self, engine: int, functions: Mapping[str, HostFunction]) -> None:
        self._raised: dict[int, BaseException] = {}  # by thread: what a host function raised under its guest call
        #: Memory of each live instance, by its context: a host call finds it without asking Wasmtime four things.
        self.memories: Final[dict[int, GuestMemory]] = {}
        self._callbacks = []  # Wasmtime keeps their addresses, so they must live as long as the linker
        self._linker: int | None = binding.linker_new(engine)
        for name, signature in IMPORTS.items():
            callback = binding.UncheckedCallback(self._trampoline(name, signature, functions[name]))
            self._callbacks.append(callback)
            self._define(name, signature, callback)

    def _define(self, name: str, signature: Signature, callback: ctypes._FuncPointer) -> None:
        function_type = binding.function_type(signature.params, signature.results)
        namespace, encoded = IMPORT_NAMESPACE.encode(), name.encode()
        error = binding.linker_define_func_unchecked(
            self._linker,
            *(namespace, len(namespace)),
            *(encoded, len(encoded)),
            function_type,
            callback,
            *(None, None),
        )
        binding.functype_delete(function_type)
        binding.check(error, GuestError, f"cannot define {name}")

    def _trampoline(
        self, name: str, signature: Signature, function: HostFunction
    ) -> Callable[[int | None, int, int, int], int | None]:
        layout = parameters_struct(signature)
        slots = ctypes.c_char * (binding.VAL_RAW_BYTES * max(1, len(signature.params)))
        ranges, memories = signature.ranges, self.memories
        pack_result = None if signature.result is None else Struct("<" + RESULT_FORMATS[signature.result]).pack_into

        def call(_environment: int | None, caller: int, values: int, _num_values: int) -> int | None:
            try:
                buffer = slots.from_address(values)
                arguments = layout.unpack_from(buffer)
                memory = memories.get(binding.caller_context(caller)) or caller_memory(caller)
                for pointer, length in ranges:
                    memory.check(arguments[pointer], arguments[length])
                result = function(memory, *arguments)
                if pack_result is not None:
                    pack_result(buffer, 0, result)
                return None
            except BaseException as error:  # ctypes would print it and go on: it travels round the guest instead
                self._raised[threading.get_ident()] = error
                message = f"host function {name}: {error}".encode()
                trap: int = binding.trap_new(message, len(message))
                return trap

        return call

    def instantiate_pre(self, module: int) -> int:
        """A ``wasmtime_instance_pre_t`` of ``module``; the caller deletes it.

        Raises:
            GuestContractError: the module imports what is not defined.
        """
        result = c_void_p()
        error = binding.linker_instantiate_pre(self._linker, module, byref(result))
        binding.check(error, GuestContractError, "the guest cannot be linked")
        assert result.value is not None  # set whenever there is no error
        return result.value

    def take_raised(self) -> BaseException | None:
        """What a host function raised during this thread's guest call, once."""
        return self._raised.pop(threading.get_ident(), None)

    def close(self) -> None:
        """Free the linker. Idempotent. Modules linked with it go on working while they hold this object, which
        keeps the callbacks alive."""
        if self._linker is not None:
            binding.linker_delete(self._linker)
            self._linker = None


def caller_memory(caller: int) -> GuestMemory:
    """Memory of a guest that calls before its instance is made (from a start function).

    Raises:
        GuestContractError: it exports none.
    """
    item = binding.Extern()
    if not binding.caller_export_get(caller, b"memory", 6, byref(item)) or item.kind != binding.EXTERN_MEMORY:
        raise GuestContractError("the guest exports no memory")
    return GuestMemory(binding.caller_context(caller), item.of.memory)
