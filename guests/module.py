"""Reads a guest's WebAssembly and refuses everything that a snapshot could not restore.

A snapshot holds linear memory, mutable numeric globals and funcref tables, so a guest has exactly one own memory,
imports nothing but the ABI's functions, and has no passive segments (whether one was dropped cannot be observed),
tags or other references. Sizes are capped before anything is built from them. Of function bodies only sizes and
locals are read here: Wasmtime validates the code, with every unneeded proposal switched off.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from guests.abi import IMPORT_NAMESPACE
from guests.binding import KIND_I32, KIND_I64
from guests.errors import GuestModuleRefused
from guests.signatures import EXPORTS, IMPORTS, LIFECYCLE_EXPORTS, TOKENIZER_EXPORTS, WRITER_EXPORTS, Signature
from guests.wasm_format import ExternKind, Reader, Section, SectionId, ValueType, split_sections

MAX_MODULE_BYTES: Final = 64 << 20  # before its memory is baked in
MAX_BAKED_BYTES: Final = MAX_MODULE_BYTES + (512 << 20)
MAX_FUNCTION_BYTES: Final = 4 << 20
MAX_LOCALS: Final = 10_000  # of a function: its frame, and what the compiler spends on it
MAX_CUSTOM_BYTES: Final = 16 << 20  # all custom sections of a module
MAX_TYPES: Final = 10_000
MAX_IMPORTS: Final = 1_000
MAX_FUNCTIONS: Final = 100_000
MAX_TABLES: Final = 16
MAX_TABLE_ELEMENTS: Final = 65_536
MAX_MEMORY_PAGES: Final = 8_192  # 512 MiB
MAX_GLOBALS: Final = 10_000
MAX_EXPORTS: Final = 10_000
MAX_SEGMENTS: Final = 100_000
MAX_PARAMETERS: Final = 1_000
STATE_PREFIX: Final = "glowplug:"  # of the exports that the snapshotter adds


@dataclass(frozen=True, slots=True)
class FunctionType:
    """Parameter and result types."""

    params: tuple[ValueType, ...]
    results: tuple[ValueType, ...]

    def matches(self, signature: Signature) -> bool:
        """Whether this is ``signature``."""
        kinds = {KIND_I32: ValueType.I32, KIND_I64: ValueType.I64}
        return self.params == tuple(kinds[k] for k in signature.params) and self.results == tuple(
            kinds[k] for k in signature.results
        )

    def __str__(self) -> str:
        params = ", ".join(t.name.lower() for t in self.params)
        return f"({params})" + (f" -> {', '.join(t.name.lower() for t in self.results)}" if self.results else "")


@dataclass(frozen=True, slots=True)
class Limits:
    """Size of a table (elements) or memory (pages)."""

    minimum: int
    maximum: int | None


@dataclass(frozen=True, slots=True)
class GlobalVariable:
    """A global; ``initialiser`` includes its ``end``."""

    type: ValueType
    mutable: bool
    initialiser: bytes


@dataclass(frozen=True, slots=True)
class Import:
    """An imported function."""

    module: str
    name: str
    type: FunctionType


@dataclass(frozen=True, slots=True)
class Export:
    """An export and the index of what it exports."""

    name: str
    kind: ExternKind
    index: int


@dataclass(slots=True)
class WasmModule:
    """What the snapshotter needs to know of a module. ``functions`` has the imported ones first;
    ``declared_functions`` are those in element segments, which code may take references to."""

    sections: list[Section]
    types: list[FunctionType] = field(default_factory=list)
    imports: list[Import] = field(default_factory=list)
    functions: list[FunctionType] = field(default_factory=list)
    tables: list[Limits] = field(default_factory=list)
    memory: Limits | None = None
    globals: list[GlobalVariable] = field(default_factory=list)
    exports: list[Export] = field(default_factory=list)
    start: int | None = None
    declared_functions: set[int] = field(default_factory=set)

    def exported_function(self, name: str) -> FunctionType | None:
        """Type of the function exported as ``name``, if there is one."""
        for export in self.exports:
            if export.name == name and export.kind is ExternKind.FUNCTION:
                return self.functions[export.index]
        return None

    @property
    def has_tokenizer(self) -> bool:
        """Whether the guest tokenises."""
        return self.exported_function("gp_tokenize") is not None


def parse_module(wasm: bytes, *, max_bytes: int = MAX_MODULE_BYTES) -> WasmModule:
    """Parse ``wasm`` and refuse what cannot be snapshotted. ``max_bytes``: MAX_BAKED_BYTES for a baked module.

    Raises:
        GuestModuleRefused: malformed, over a limit, or not restorable; the message names section and reason.
    """
    if len(wasm) > max_bytes:
        raise GuestModuleRefused(f"module of {len(wasm)} bytes: at most {max_bytes}")
    module = WasmModule(split_sections(wasm))
    parsers = {
        SectionId.TYPE: _parse_types,
        SectionId.IMPORT: _parse_imports,
        SectionId.FUNCTION: _parse_functions,
        SectionId.TABLE: _parse_tables,
        SectionId.MEMORY: _parse_memory,
        SectionId.GLOBAL: _parse_globals,
        SectionId.EXPORT: _parse_exports,
        SectionId.START: _parse_start,
        SectionId.ELEMENT: _parse_elements,
        SectionId.CODE: _parse_code,
        SectionId.DATA: _parse_data,
    }
    for section in module.sections:
        reader = Reader(section.body, f"{section.id.name.lower()} section")
        if section.id is SectionId.TAG:
            raise reader.refuse("exception tags cannot be snapshotted")
        if section.id in parsers:
            parsers[section.id](reader, module)
            reader.expect_end()
    if module.memory is None:
        raise GuestModuleRefused("the module has no memory of its own")
    if sum(len(section.body) for section in module.sections if section.id is SectionId.CUSTOM) > MAX_CUSTOM_BYTES:
        raise GuestModuleRefused(f"custom sections of more than {MAX_CUSTOM_BYTES} bytes")
    return module


def parse_guest(wasm: bytes, *, max_bytes: int = MAX_MODULE_BYTES) -> WasmModule:
    """:func:`parse_module`, and check imports and exports against the guest ABI.

    Raises:
        GuestModuleRefused: see :func:`parse_module`; or a missing, unknown or wrongly typed function.
    """
    module = parse_module(wasm, max_bytes=max_bytes)
    for function in module.imports:
        _validate_import(function)
    if not any(e.name == "memory" and e.kind is ExternKind.MEMORY for e in module.exports):
        raise GuestModuleRefused("the guest does not export its memory as 'memory'")
    required = dict(LIFECYCLE_EXPORTS)
    names = {export.name for export in module.exports}
    if not names.isdisjoint(TOKENIZER_EXPORTS | WRITER_EXPORTS):
        required |= TOKENIZER_EXPORTS  # some of them without the others is a mistake
    if not names.isdisjoint(WRITER_EXPORTS):
        required |= WRITER_EXPORTS
    for name, signature in required.items():
        function_type = module.exported_function(name)
        if function_type is None:
            raise GuestModuleRefused(f"the guest does not export the function {name}{signature}")
        if not function_type.matches(signature):
            raise GuestModuleRefused(f"export {name} is {function_type}: the ABI has {signature}")
    for export in module.exports:
        if export.name.startswith("gp_") and export.name not in EXPORTS:
            raise GuestModuleRefused(f"export {export.name!r} is not in the ABI; names gp_* are reserved")
    return module


def _validate_import(function: Import) -> None:
    if function.module != IMPORT_NAMESPACE or function.name not in IMPORTS:
        names = ", ".join(IMPORTS)
        raise GuestModuleRefused(
            f"import {function.module}.{function.name}: guests import only {IMPORT_NAMESPACE}: {names}"
        )
    signature = IMPORTS[function.name]
    if not function.type.matches(signature):
        raise GuestModuleRefused(f"import {function.name} is {function.type}: the ABI has {signature}")


def _parse_types(reader: Reader, module: WasmModule) -> None:
    for _ in range(reader.count(MAX_TYPES, "types")):
        form = reader.byte()
        if form != 0x60:
            raise reader.refuse(f"type form {form:#x}: only plain function types are supported")
        params = [reader.value_type() for _ in range(reader.count(MAX_PARAMETERS, "parameters"))]
        results = [reader.value_type() for _ in range(reader.count(MAX_PARAMETERS, "results"))]
        module.types.append(FunctionType(tuple(params), tuple(results)))


def _function_type(reader: Reader, module: WasmModule) -> FunctionType:
    index = reader.u32()
    if index >= len(module.types):
        raise reader.refuse(f"type {index} of {len(module.types)}")
    return module.types[index]


def _parse_imports(reader: Reader, module: WasmModule) -> None:
    for _ in range(reader.count(MAX_IMPORTS, "imports")):
        namespace, name = reader.name(), reader.name()
        kind = reader.byte()
        if kind != ExternKind.FUNCTION:
            raise reader.refuse(f"import {namespace}.{name} is not a function")
        function_type = _function_type(reader, module)
        module.imports.append(Import(namespace, name, function_type))
        module.functions.append(function_type)


def _parse_functions(reader: Reader, module: WasmModule) -> None:
    for _ in range(reader.count(MAX_FUNCTIONS, "functions")):
        module.functions.append(_function_type(reader, module))


def _limits(reader: Reader, what: str) -> Limits:
    flags = reader.byte()
    if flags > 1:
        raise reader.refuse(f"{what} that is shared, 64-bit or has its own page size (flags {flags:#x})")
    minimum = reader.u32()
    return Limits(minimum, reader.u32() if flags & 1 else None)


def _parse_tables(reader: Reader, module: WasmModule) -> None:
    for _ in range(reader.count(MAX_TABLES, "tables")):
        if reader.byte() != ValueType.FUNCREF:
            raise reader.refuse("a table that is not a plain funcref table")
        limits = _limits(reader, "table")
        if limits.minimum > MAX_TABLE_ELEMENTS:
            raise reader.refuse(f"table of {limits.minimum} elements: at most {MAX_TABLE_ELEMENTS}")
        module.tables.append(limits)


def _parse_memory(reader: Reader, module: WasmModule) -> None:
    if reader.u32() != 1:
        raise reader.refuse("a guest has exactly one memory")
    module.memory = _limits(reader, "memory")
    if module.memory.minimum > MAX_MEMORY_PAGES:
        raise reader.refuse(f"memory of {module.memory.minimum} pages: at most {MAX_MEMORY_PAGES}")


def _parse_globals(reader: Reader, module: WasmModule) -> None:
    for _ in range(reader.count(MAX_GLOBALS, "globals")):
        value_type, mutability = reader.value_type(), reader.byte()
        if mutability > 1:
            raise reader.refuse(f"global mutability {mutability:#x}: shared globals cannot be snapshotted")
        if mutability and value_type is ValueType.FUNCREF:
            raise reader.refuse("a mutable global that holds a reference cannot be snapshotted")
        module.globals.append(GlobalVariable(value_type, bool(mutability), reader.constant_expression()))


def _parse_exports(reader: Reader, module: WasmModule) -> None:
    sizes = {
        ExternKind.FUNCTION: len(module.functions),
        ExternKind.TABLE: len(module.tables),
        ExternKind.MEMORY: 1 if module.memory is not None else 0,
        ExternKind.GLOBAL: len(module.globals),
    }
    for _ in range(reader.count(MAX_EXPORTS, "exports")):
        name, kind, index = reader.name(), reader.byte(), reader.u32()
        if name.startswith(STATE_PREFIX):
            raise reader.refuse(f"export {name!r}: names {STATE_PREFIX}* are the snapshotter's")
        if kind not in sizes or index >= sizes[ExternKind(kind)]:
            raise reader.refuse(f"export {name!r} is of an unknown kind, or its index {index} is out of range")
        module.exports.append(Export(name, ExternKind(kind), index))


def _function_index(reader: Reader, module: WasmModule, what: str) -> int:
    index = reader.u32()
    if index >= len(module.functions):
        raise reader.refuse(f"{what}: function {index} of {len(module.functions)}")
    return index


def _parse_start(reader: Reader, module: WasmModule) -> None:
    module.start = _function_index(reader, module, "start function")


def _parse_elements(reader: Reader, module: WasmModule) -> None:
    for _ in range(reader.count(MAX_SEGMENTS, "element segments")):
        flags = reader.u32()
        if flags > 7:
            raise reader.refuse(f"element segment flags {flags:#x}")
        is_active, has_index, has_expressions = not flags & 1, bool(flags & 2), bool(flags & 4)
        if not is_active and not has_index:
            raise reader.refuse("a passive element segment cannot be snapshotted")
        if is_active:
            if has_index:
                reader.u32()  # table
            reader.constant_expression()  # offset
        if has_index:  # also of declarative segments: the kind of element is spelt out
            kind = reader.byte()
            if kind != (ValueType.FUNCREF if has_expressions else 0):
                raise reader.refuse("an element segment that does not hold functions")
        for _ in range(reader.count(MAX_SEGMENTS, "elements")):
            if has_expressions:
                _parse_element_expression(reader, module)
            else:
                module.declared_functions.add(_function_index(reader, module, "element"))


def _parse_element_expression(reader: Reader, module: WasmModule) -> None:
    expression = Reader(reader.constant_expression(), "element expression")
    if expression.byte() == 0xD2:  # ref.func; the other possibilities are null and an immutable global
        module.declared_functions.add(_function_index(expression, module, "element"))


def _parse_code(reader: Reader, module: WasmModule) -> None:
    own = len(module.functions) - len(module.imports)
    if reader.count(MAX_FUNCTIONS, "function bodies") != own:
        raise reader.refuse(f"another number of bodies than the {own} functions that are declared")
    for index in range(own):
        size = reader.u32()
        if size > MAX_FUNCTION_BYTES:
            raise reader.refuse(f"body {index} of {size} bytes: at most {MAX_FUNCTION_BYTES}")
        start = reader.position
        num_locals = sum(_skip_locals(reader) for _ in range(reader.count(MAX_LOCALS, "groups of locals")))
        if num_locals > MAX_LOCALS:
            raise reader.refuse(f"body {index} with {num_locals} locals: at most {MAX_LOCALS}")
        rest = size - (reader.position - start)
        if rest < 1:
            raise reader.refuse(f"body {index} ends within its locals")
        reader.skip(rest)


def _skip_locals(reader: Reader) -> int:
    number = reader.u32()
    reader.value_type()
    return number


def _parse_data(reader: Reader, module: WasmModule) -> None:
    for _ in range(reader.count(MAX_SEGMENTS, "data segments")):
        flags = reader.u32()
        if flags != 0:
            raise reader.refuse("a passive data segment, or one of another memory, cannot be snapshotted")
        reader.constant_expression()
        reader.skip(reader.u32())
