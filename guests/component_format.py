"""Reads what a WebAssembly component imports and exports, before Wasmtime sees it.

Only the outermost level is read: what is nested inside can reach the host through nothing but the outermost imports.

Source: WebAssembly Component Model, ``design/mvp/Binary.md`` (sections 10 and 11).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from guests.errors import GuestModuleRefused
from guests.wasm_format import Reader

PREAMBLE: Final = b"\0asm\x0d\0\1\0"
MAX_COMPONENT_BYTES: Final = 128 << 20
MAX_SECTIONS: Final = 10_000  # a component made of many adapters has thousands
MAX_EXTERNS: Final = 1_000
SECTION_START: Final = 9
SECTION_IMPORT: Final = 10
SECTION_EXPORT: Final = 11
LAST_SECTION: Final = 12
CORE_MODULE_SORT: Final = 0


@dataclass(frozen=True, slots=True)
class ComponentOutline:
    """Names at the outermost level, and section sizes in file order as (section number, bytes)."""

    imports: tuple[str, ...]
    exports: tuple[str, ...]
    sections: tuple[tuple[int, int], ...]


def parse_component(component: bytes) -> ComponentOutline:
    """The outline of ``component``.

    Raises:
        GuestModuleRefused: not a component, malformed or over a limit.
    """
    if len(component) > MAX_COMPONENT_BYTES:
        raise GuestModuleRefused(f"component of {len(component)} bytes: at most {MAX_COMPONENT_BYTES}")
    reader = Reader(component, "component")
    if component[: len(PREAMBLE)] != PREAMBLE:
        raise reader.refuse("not a WebAssembly component")
    reader.skip(len(PREAMBLE))
    imports: list[str] = []
    exports: list[str] = []
    sections: list[tuple[int, int]] = []
    while reader.remaining:
        number, size = reader.byte(), reader.u32()
        sections.append((number, size))
        if number > LAST_SECTION or len(sections) > MAX_SECTIONS:
            raise reader.refuse(f"section {number} is unknown, or there are more than {MAX_SECTIONS}")
        if number == SECTION_START:
            raise reader.refuse("a component with a start function: what it needs at start belongs into resume")
        if number == SECTION_IMPORT:
            imports += _import_names(Reader(reader.take(size), "component import section"))
        elif number == SECTION_EXPORT:
            exports += _export_names(Reader(reader.take(size), "component export section"))
        else:
            reader.skip(size)
    return ComponentOutline(tuple(imports), tuple(exports), tuple(sections))


def _import_names(reader: Reader) -> list[str]:
    names = []
    for _ in range(reader.count(MAX_EXTERNS, "imports")):
        names.append(_name(reader))
        _skip_type(reader)
    reader.expect_end()
    return names


def _export_names(reader: Reader) -> list[str]:
    names = []
    for _ in range(reader.count(MAX_EXTERNS, "exports")):
        names.append(_name(reader))
        if reader.byte() == CORE_MODULE_SORT:  # a core sort has a second byte
            reader.byte()
        reader.u32()  # index
        if reader.byte():  # a type is ascribed
            _skip_type(reader)
    reader.expect_end()
    return names


def _name(reader: Reader) -> str:
    form = reader.byte()
    if form > 1:
        raise reader.refuse(f"name of form {form:#x}")
    return reader.name()


def _skip_type(reader: Reader) -> None:
    """An ``externdesc``."""
    sort = reader.byte()
    if sort == CORE_MODULE_SORT:
        reader.byte()
    elif sort in (2, 3):  # value and type bounds: 0 has an index, 1 not always
        bound = reader.byte()
        if sort == 3 and bound == 1:
            return
    elif sort > 5:
        raise reader.refuse(f"a type of sort {sort:#x}")
    reader.u32()
