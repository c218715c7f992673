"""Freezes an initialised guest into a new module: Wizer's method in Python.

1. :func:`prepare` adds exports for the state that a module hides (mutable globals, tables, functions) and turns the
   start function into an export.
2. The caller instantiates that module and runs its initialisation.
3. :func:`capture` reads memory, globals and tables out of the live instance.
4. :func:`bake` writes them into the original module: memory as one dense active data segment, globals as constants,
   tables as element segments, no start function.

One dense segment matters: Wasmtime maps a memory image copy-on-write out of the compiled file when at least half of
its span is data (any span up to 16 MiB), and silently copies it otherwise. Restoring is then O(1) in its size.
"""

from __future__ import annotations

import struct
from ctypes import byref
from dataclasses import dataclass
from typing import Final

from guests import binding
from guests.errors import GuestModuleRefused
from guests.module import STATE_PREFIX, Limits, WasmModule
from guests.runtime import GuestInstance
from guests.wasm_format import (
    WASM_PAGE_BYTES,
    ExternKind,
    Reader,
    Section,
    SectionId,
    ValueType,
    encode_name,
    encode_signed,
    encode_u32,
    encode_vector,
    join_sections,
)

HOST_PAGE_BYTES: Final = 4_096
ZERO_PAGE: Final = bytes(HOST_PAGE_BYTES)
START_EXPORT: Final = f"{STATE_PREFIX}start"
END: Final = b"\x0b"

NUMERIC_BYTES: Final = {
    ValueType.I32: 4,
    ValueType.F32: 4,
    ValueType.I64: 8,
    ValueType.F64: 8,
    ValueType.V128: 16,
}


@dataclass(frozen=True, slots=True)
class CapturedState:
    """State of an instance at rest. ``globals`` maps a mutable global's index to its little-endian bytes; a table is
    a list of function indices, None for null."""

    memory: bytes
    globals: dict[int, bytes]
    tables: list[list[int | None]]


def prepare(module: WasmModule) -> bytes:
    """The module with its state exported and its start function not run but exported as :data:`START_EXPORT`."""
    added = [(f"{STATE_PREFIX}global.{i}", ExternKind.GLOBAL, i) for i, g in enumerate(module.globals) if g.mutable]
    added += [(f"{STATE_PREFIX}table.{i}", ExternKind.TABLE, i) for i in range(len(module.tables))]
    if module.tables:  # to tell which function a table element is
        added += [(f"{STATE_PREFIX}function.{i}", ExternKind.FUNCTION, i) for i in range(len(module.functions))]
    added.append((f"{STATE_PREFIX}memory", ExternKind.MEMORY, 0))
    if module.start is not None:
        added.append((START_EXPORT, ExternKind.FUNCTION, module.start))
    entries = [(export.name, export.kind, export.index) for export in module.exports] + added
    exports = encode_vector([encode_name(name) + bytes([kind]) + encode_u32(index) for name, kind, index in entries])
    dropped = (SectionId.EXPORT, SectionId.START, SectionId.CUSTOM)
    kept = [s for s in module.sections if s.id not in dropped]
    return join_sections([*kept, Section(SectionId.EXPORT, exports), *_name_sections(module)])


def capture(module: WasmModule, instance: GuestInstance) -> CapturedState:
    """Copy the state of ``instance``, which was made from ``prepare(module)`` and has no call in progress.

    Raises:
        GuestModuleRefused: a table holds a function that is not the guest's own.
        GuestTrap: the instance is closed.
    """
    memory = _state(instance, "memory").of.memory
    size_bytes = binding.memory_data_size(instance.context, byref(memory))
    return CapturedState(
        instance.read(0, size_bytes),
        {i: _capture_global(instance, i, g.type) for i, g in enumerate(module.globals) if g.mutable},
        _capture_tables(module, instance),
    )


def _state(instance: GuestInstance, name: str) -> binding.Extern:
    item = instance.export(STATE_PREFIX + name)
    if item is None:
        raise GuestModuleRefused(f"{STATE_PREFIX}{name} is missing: the instance is not of a prepared module")
    return item


def _capture_global(instance: GuestInstance, index: int, value_type: ValueType) -> bytes:
    value = binding.Value()
    binding.global_get(instance.context, byref(_state(instance, f"global.{index}").of.global_), byref(value))
    return bytes(value.of.bytes)[: NUMERIC_BYTES[value_type]]


def _capture_tables(module: WasmModule, instance: GuestInstance) -> list[list[int | None]]:
    if not module.tables:
        return []
    context = instance.context
    index_of: dict[int, int] = {}
    for i in range(len(module.functions)):
        function = _state(instance, f"function.{i}").of.function
        index_of.setdefault(binding.func_to_raw(context, byref(function)), i)
    tables: list[list[int | None]] = []
    for t in range(len(module.tables)):
        table = _state(instance, f"table.{t}").of.table
        elements: list[int | None] = []
        for position in range(binding.table_size(context, byref(table))):
            value = binding.Value()
            binding.table_get(context, byref(table), position, byref(value))
            function = value.of.function
            if function.store_id == 0:
                elements.append(None)
                continue
            index = index_of.get(binding.func_to_raw(context, byref(function)))
            if index is None:
                raise GuestModuleRefused(f"table {t}, element {position}: a function that is not the guest's")
            elements.append(index)
        tables.append(elements)
    return tables


def bake(module: WasmModule, state: CapturedState) -> bytes:
    """The module that starts in ``state``. Deterministic: equal inputs give equal bytes.

    Compiling the result validates it: code that refers to data or element segments by number (``memory.init``,
    ``table.init``) no longer finds them and is refused there.
    """
    assert module.memory is not None  # parse_module made sure
    bodies: dict[SectionId, bytes] = {
        section.id: section.body
        for section in module.sections
        if section.id not in (SectionId.CUSTOM, SectionId.START, SectionId.ELEMENT, SectionId.DATA)
    }
    pages = Limits(len(state.memory) // WASM_PAGE_BYTES, module.memory.maximum)
    bodies[SectionId.MEMORY] = encode_vector([_encode_limits(pages)])
    if module.tables:
        bodies[SectionId.TABLE] = encode_vector(
            [
                bytes([ValueType.FUNCREF]) + _encode_limits(Limits(len(elements), table.maximum))
                for table, elements in zip(module.tables, state.tables, strict=True)
            ]
        )
    if module.globals:
        bodies[SectionId.GLOBAL] = _bake_globals(module, state)
    elements = _bake_elements(module, state)
    if elements:
        bodies[SectionId.ELEMENT] = encode_vector(elements)
    if SectionId.DATA_COUNT in bodies:
        bodies[SectionId.DATA_COUNT] = encode_u32(1)
    bodies[SectionId.DATA] = _bake_memory(state.memory)
    return join_sections([*(Section(number, body) for number, body in bodies.items()), *_name_sections(module)])


def _name_sections(module: WasmModule) -> list[Section]:
    """Function names for backtraces. No other custom section reaches the compiler."""
    return [
        section
        for section in module.sections
        if section.id is SectionId.CUSTOM and Reader(section.body, "custom section").name() == "name"
    ]


def _encode_limits(limits: Limits) -> bytes:
    if limits.maximum is None:
        return b"\0" + encode_u32(limits.minimum)
    return b"\1" + encode_u32(limits.minimum) + encode_u32(limits.maximum)


def _bake_memory(memory: bytes) -> bytes:
    start, end = 0, len(memory)
    while end > 0 and memory[end - HOST_PAGE_BYTES : end] == ZERO_PAGE:
        end -= HOST_PAGE_BYTES
    while start < end and memory[start : start + HOST_PAGE_BYTES] == ZERO_PAGE:
        start += HOST_PAGE_BYTES
    offset = b"\x41" + encode_signed(start) + END  # i32.const; memory is capped below 2 GiB
    return b"".join([encode_u32(1), encode_u32(0), offset, encode_u32(end - start), memoryview(memory)[start:end]])


def _bake_globals(module: WasmModule, state: CapturedState) -> bytes:
    return encode_vector(
        [
            bytes([g.type, g.mutable]) + (_constant(g.type, state.globals[i]) if g.mutable else g.initialiser)
            for i, g in enumerate(module.globals)
        ]
    )


def _constant(value_type: ValueType, data: bytes) -> bytes:
    match value_type:
        case ValueType.I32:
            return b"\x41" + encode_signed(struct.unpack("<i", data)[0]) + END
        case ValueType.I64:
            return b"\x42" + encode_signed(struct.unpack("<q", data)[0]) + END
        case ValueType.F32:
            return b"\x43" + data + END
        case ValueType.F64:
            return b"\x44" + data + END
        case ValueType.V128:
            return b"\xfd\x0c" + data + END
        case ValueType.FUNCREF:
            raise GuestModuleRefused("a mutable global that holds a reference cannot be snapshotted")


def _bake_elements(module: WasmModule, state: CapturedState) -> list[bytes]:
    segments = []
    for table, elements in enumerate(state.tables):
        if not elements:
            continue
        head = encode_u32(6) + encode_u32(table) + b"\x41\0" + END + bytes([ValueType.FUNCREF])
        null = b"\xd0" + bytes([ValueType.FUNCREF]) + END
        segments.append(head + encode_vector([null if f is None else b"\xd2" + encode_u32(f) + END for f in elements]))
    if module.declared_functions:  # code may still take references to what was in a segment
        functions = [encode_u32(index) for index in sorted(module.declared_functions)]
        segments.append(encode_u32(3) + b"\0" + encode_vector(functions))
    return segments
