"""The part of Wasmtime's C API that glowplug uses, bound by hand with ctypes.

``import wasmtime`` builds some 700 prototypes and takes 25 to 60 ms, which a cold start does not have; this module
only finds the shared library inside the installed wheel and binds the functions below. Every function has its
``argtypes``: a call with a wrong number or kind of arguments raises instead of corrupting the stack.

Pointers to Wasmtime's objects are plain integers (``c_void_p``). Nothing here owns anything: see :mod:`guests.runtime`
for lifetimes. ``CDLL`` releases the GIL during each call, so guest code does not hold up other threads.

Source: ``wasmtime.h`` and ``wasm.h`` of Wasmtime 50 (structures ``wasmtime_func_t`` and following).
"""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import re
from collections.abc import Callable
from ctypes import POINTER, c_bool, c_char_p, c_int64, c_size_t, c_uint8, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any, Final

from guests.errors import GuestError, GuestTrap

# Kinds of wasm_valtype_t and of wasmtime_extern_t.
KIND_I32: Final = 0
KIND_I64: Final = 1
EXTERN_FUNC: Final = 0
EXTERN_MEMORY: Final = 3

VAL_RAW_BYTES: Final = 16  # sizeof(wasmtime_val_raw_t)
MAX_FRAMES: Final = 3  # of a backtrace in a message


class ByteVector(ctypes.Structure):
    """``wasm_byte_vec_t``; freed with :data:`byte_vec_delete`."""

    _fields_ = [("size", c_size_t), ("data", c_void_p)]  # ctypes reads it as it is
    size: int
    data: int | None


class PointerVector(ctypes.Structure):
    """``wasm_valtype_vec_t``."""

    _fields_ = [("size", c_size_t), ("data", POINTER(c_void_p))]
    size: int
    data: ctypes._Pointer[c_void_p]


class Function(ctypes.Structure):
    """``wasmtime_func_t``; ``store_id`` 0 is the null reference."""

    _fields_ = [("store_id", c_uint64), ("private", c_void_p)]
    store_id: int


class _StoreIndex(ctypes.Structure):
    _fields_ = [("store_id", c_uint64), ("private1", c_uint32)]


class Memory(ctypes.Structure):
    """``wasmtime_memory_t``."""

    _fields_ = [("index", _StoreIndex), ("private2", c_uint32)]


class Table(ctypes.Structure):
    """``wasmtime_table_t``."""

    _fields_ = [("index", _StoreIndex), ("private2", c_uint32)]


class Global(ctypes.Structure):
    """``wasmtime_global_t``."""

    _fields_ = [
        ("store_id", c_uint64),
        ("private1", c_uint32),
        ("private2", c_uint32),
        ("private3", c_uint32),
    ]


class _ExternUnion(ctypes.Union):
    _fields_ = [
        ("function", Function),
        ("global_", Global),
        ("table", Table),
        ("memory", Memory),
        ("pointer", c_void_p),
    ]
    function: Function
    global_: Global
    table: Table
    memory: Memory


class Extern(ctypes.Structure):
    """``wasmtime_extern_t``."""

    _fields_ = [("kind", c_uint8), ("of", _ExternUnion)]
    kind: int
    of: _ExternUnion


class _Reference(ctypes.Structure):  # wasmtime_externref_t and its like: the largest members of the value union
    _fields_ = [
        ("store_id", c_uint64),
        ("private1", c_uint32),
        ("private2", c_uint32),
        ("private3", c_void_p),
    ]


class _ValueUnion(ctypes.Union):
    _fields_ = [
        ("bytes", c_uint8 * 16),
        ("function", Function),
        ("reference", _Reference),
    ]
    function: Function


class Value(ctypes.Structure):
    """``wasmtime_val_t``, the checked value; ``of.bytes`` holds a number's little-endian bytes."""

    _fields_ = [("kind", c_uint8), ("of", _ValueUnion)]
    kind: int
    of: _ValueUnion


class Instance(ctypes.Structure):
    """``wasmtime_instance_t``."""

    _fields_ = [("store_id", c_uint64), ("private", c_size_t)]


# wasm_trap_t *callback(void *env, wasmtime_caller_t *caller, wasmtime_val_raw_t *values, size_t num_values)
UncheckedCallback = ctypes.CFUNCTYPE(c_void_p, c_void_p, c_void_p, c_void_p, c_size_t)


def library_path() -> Path:
    """The shared library of the installed ``wasmtime`` wheel, found without importing the package.

    Raises:
        GuestError: there is no such wheel, or it holds no library for this machine.
    """
    spec = importlib.util.find_spec("wasmtime")
    if spec is None or not spec.submodule_search_locations:
        raise GuestError("the package 'wasmtime' is not installed; glowplug needs wasmtime>=50,<51")
    path = Path(spec.submodule_search_locations[0]) / f"linux-{platform.machine()}" / "_libwasmtime.so"
    if not path.is_file():
        raise GuestError(f"{path} does not exist: this wasmtime wheel is not for Linux {platform.machine()}")
    return path


_library: Final = ctypes.CDLL(str(library_path()))

# The bound functions are called with ctypes objects of many kinds; Any keeps their signatures readable, and ctypes
# checks every argument against argtypes at run time.
_Bound = Callable[..., Any]


def _bind(name: str, result: Any, *arguments: Any) -> _Bound:
    function = _library[name]
    function.restype = result
    function.argtypes = arguments
    return function


byte_vec_delete = _bind("wasm_byte_vec_delete", None, POINTER(ByteVector))

config_new = _bind("wasm_config_new", c_void_p)
config_target_set = _bind("wasmtime_config_target_set", c_void_p, c_void_p, c_char_p)
config_cranelift_flag_enable = _bind("wasmtime_config_cranelift_flag_enable", None, c_void_p, c_char_p)
engine_new_with_config = _bind("wasm_engine_new_with_config", c_void_p, c_void_p)
engine_delete = _bind("wasm_engine_delete", None, c_void_p)
engine_increment_epoch = _bind("wasmtime_engine_increment_epoch", None, c_void_p)

module_new = _bind("wasmtime_module_new", c_void_p, c_void_p, c_char_p, c_size_t, POINTER(c_void_p))
module_serialize = _bind("wasmtime_module_serialize", c_void_p, c_void_p, POINTER(ByteVector))
module_deserialize_file = _bind("wasmtime_module_deserialize_file", c_void_p, c_void_p, c_char_p, POINTER(c_void_p))
module_delete = _bind("wasmtime_module_delete", None, c_void_p)

component_new = _bind("wasmtime_component_new", c_void_p, c_void_p, c_char_p, c_size_t, POINTER(c_void_p))
component_serialize = _bind("wasmtime_component_serialize", c_void_p, c_void_p, POINTER(ByteVector))
component_delete = _bind("wasmtime_component_delete", None, c_void_p)

linker_new = _bind("wasmtime_linker_new", c_void_p, c_void_p)
linker_delete = _bind("wasmtime_linker_delete", None, c_void_p)
linker_define_func_unchecked = _bind(
    "wasmtime_linker_define_func_unchecked",
    c_void_p,
    c_void_p,
    *(c_char_p, c_size_t),
    *(c_char_p, c_size_t),
    c_void_p,
    UncheckedCallback,
    *(c_void_p, c_void_p),
)
linker_instantiate_pre = _bind("wasmtime_linker_instantiate_pre", c_void_p, c_void_p, c_void_p, POINTER(c_void_p))
instance_pre_delete = _bind("wasmtime_instance_pre_delete", None, c_void_p)
instance_pre_instantiate = _bind(
    "wasmtime_instance_pre_instantiate", c_void_p, c_void_p, c_void_p, POINTER(Instance), POINTER(c_void_p)
)
instance_export_get = _bind(
    "wasmtime_instance_export_get",
    c_bool,
    c_void_p,
    POINTER(Instance),
    *(c_char_p, c_size_t),
    POINTER(Extern),
)

store_new = _bind("wasmtime_store_new", c_void_p, c_void_p, c_void_p, c_void_p)
store_context = _bind("wasmtime_store_context", c_void_p, c_void_p)
store_delete = _bind("wasmtime_store_delete", None, c_void_p)
# Sizes: memory bytes, table elements, instances, tables, memories; -1 keeps the default.
store_limiter = _bind("wasmtime_store_limiter", None, c_void_p, c_int64, c_int64, c_int64, c_int64, c_int64)
context_set_epoch_deadline = _bind("wasmtime_context_set_epoch_deadline", None, c_void_p, c_uint64)

func_call_unchecked = _bind(
    "wasmtime_func_call_unchecked",
    c_void_p,
    c_void_p,
    POINTER(Function),
    c_void_p,
    c_size_t,
    POINTER(c_void_p),
)
func_type = _bind("wasmtime_func_type", c_void_p, c_void_p, POINTER(Function))
func_to_raw = _bind("wasmtime_func_to_raw", c_void_p, c_void_p, POINTER(Function))
functype_new = _bind("wasm_functype_new", c_void_p, POINTER(PointerVector), POINTER(PointerVector))
functype_delete = _bind("wasm_functype_delete", None, c_void_p)
functype_params = _bind("wasm_functype_params", POINTER(PointerVector), c_void_p)
functype_results = _bind("wasm_functype_results", POINTER(PointerVector), c_void_p)
valtype_new = _bind("wasm_valtype_new", c_void_p, c_uint8)
valtype_kind = _bind("wasm_valtype_kind", c_uint8, c_void_p)
valtype_vec_new = _bind("wasm_valtype_vec_new", None, POINTER(PointerVector), c_size_t, POINTER(c_void_p))

caller_context = _bind("wasmtime_caller_context", c_void_p, c_void_p)
caller_export_get = _bind("wasmtime_caller_export_get", c_bool, c_void_p, *(c_char_p, c_size_t), POINTER(Extern))

memory_data = _bind("wasmtime_memory_data", c_void_p, c_void_p, POINTER(Memory))
memory_data_size = _bind("wasmtime_memory_data_size", c_size_t, c_void_p, POINTER(Memory))
global_get = _bind("wasmtime_global_get", None, c_void_p, POINTER(Global), POINTER(Value))
table_get = _bind("wasmtime_table_get", c_bool, c_void_p, POINTER(Table), c_uint64, POINTER(Value))
table_size = _bind("wasmtime_table_size", c_uint64, c_void_p, POINTER(Table))

error_message = _bind("wasmtime_error_message", None, c_void_p, POINTER(ByteVector))
error_delete = _bind("wasmtime_error_delete", None, c_void_p)
trap_new = _bind("wasmtime_trap_new", c_void_p, c_char_p, c_size_t)
trap_code = _bind("wasmtime_trap_code", c_bool, c_void_p, POINTER(c_uint8))
trap_message = _bind("wasm_trap_message", None, c_void_p, POINTER(ByteVector))
trap_delete = _bind("wasm_trap_delete", None, c_void_p)


def config_setter(name: str, kind: Any) -> _Bound:
    """``wasmtime_config_<name>_set`` taking one value of ctypes type ``kind``."""
    return _bind(f"wasmtime_config_{name}_set", None, c_void_p, kind)


def take_bytes(vector: ByteVector) -> bytes:
    """Copy a byte vector's contents and free it."""
    data = ctypes.string_at(vector.data, vector.size) if vector.data else b""
    byte_vec_delete(ctypes.byref(vector))
    return data


def one_line(message: str) -> str:
    """Wasmtime's message of many lines in one: causes in order, then the innermost frames of a backtrace."""
    head, _, tail = message.partition("\n\nCaused by:\n")
    title, *frames = [" ".join(line.split()) for line in head.splitlines()] or [""]
    causes = [re.sub(r"^\s*(\d+: )?", "", line).strip() for line in tail.splitlines() if line.strip()]
    if not frames:
        return ": ".join([title, *causes])
    return f"{': '.join(causes) or title} (at {', '.join(frames[:MAX_FRAMES])})"


def take_error(error: int) -> str:
    """Message of a ``wasmtime_error_t`` in one line; the error is freed."""
    message = ByteVector()
    error_message(error, ctypes.byref(message))
    error_delete(error)
    return one_line(take_bytes(message).decode(errors="replace"))


def take_trap(trap: int) -> GuestTrap:
    """The exception for a ``wasm_trap_t``, which is freed."""
    code = c_uint8()
    has_code = trap_code(trap, ctypes.byref(code))
    message = ByteVector()
    trap_message(trap, ctypes.byref(message))
    trap_delete(trap)
    text = take_bytes(message).rstrip(b"\0").decode(errors="replace")
    return GuestTrap(one_line(text), code.value if has_code else None)


def check(error: int | None, kind: type[GuestError], what: str) -> None:
    """Raise ``kind`` with Wasmtime's message if a call returned an error."""
    if error:
        raise kind(f"{what}: {take_error(error)}")


def function_type(params: tuple[int, ...], results: tuple[int, ...]) -> int:
    """A new ``wasm_functype_t`` of value kinds; the caller frees it with :data:`functype_delete`."""
    vectors = []
    for kinds in (params, results):
        vector = PointerVector()
        items = (c_void_p * max(1, len(kinds)))(*(valtype_new(kind) for kind in kinds))
        valtype_vec_new(ctypes.byref(vector), len(kinds), items)
        vectors.append(vector)
    pointer: int = functype_new(ctypes.byref(vectors[0]), ctypes.byref(vectors[1]))
    return pointer


def function_kinds(context: int, function: Function) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Parameter and result kinds of a function. Only for modules that :mod:`guests.module` accepted: Wasmtime's C
    API aborts the process on types it cannot name (v128, typed references)."""
    kind = func_type(context, ctypes.byref(function))
    try:
        params, results = functype_params(kind).contents, functype_results(kind).contents
        return _kinds(params), _kinds(results)
    finally:
        functype_delete(kind)


def _kinds(vector: PointerVector) -> tuple[int, ...]:
    return tuple(valtype_kind(vector.data[i]) for i in range(vector.size))
