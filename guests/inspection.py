"""What a guest file is and holds: core module, component or compiled guest. Reads only; nothing of it is run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Final

from guests import component_format
from guests.compile import guest_identity
from guests.component_format import parse_component
from guests.elf_sections import MAGIC as ELF_MAGIC
from guests.elf_sections import read_sections
from guests.errors import GuestModuleRefused
from guests.module import MAX_BAKED_BYTES, WasmModule, parse_guest
from guests.wasm_format import PREAMBLE, WASM_PAGE_BYTES, ExternKind, SectionId

METADATA_SECTION: Final = ".wasmtime.engine"


def inspect_guest(data: bytes) -> dict[str, Any]:
    """A report for ``--json``; :func:`report_lines` makes it readable.

    Raises:
        GuestModuleRefused: a module or component that breaks a rule, or no guest at all.
        GuestIncompatible: a malformed compiled guest.
    """
    readers: dict[bytes, Callable[[bytes], dict[str, Any]]] = {
        PREAMBLE: _inspect_module,
        component_format.PREAMBLE: _inspect_component,
        ELF_MAGIC: _inspect_compiled,
    }
    for magic, read in readers.items():
        if data.startswith(magic):
            return {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), **read(data)}
    raise GuestModuleRefused("neither a WebAssembly module, nor a component, nor a compiled guest")


def _inspect_module(data: bytes) -> dict[str, Any]:
    module = parse_guest(data, max_bytes=MAX_BAKED_BYTES)
    assert module.memory is not None  # parse_guest made sure
    return {
        "kind": "module",
        "sections": [{"name": s.id.name.lower(), "size_bytes": len(s.body)} for s in module.sections],
        "imports": [f"{function.name}{function.type}" for function in module.imports],
        "exports": [_describe_export(module, export.name, export.kind, export.index) for export in module.exports],
        "functions": len(module.functions) - len(module.imports),
        "memory_bytes": module.memory.minimum * WASM_PAGE_BYTES,
        "data_bytes": sum(len(s.body) for s in module.sections if s.id is SectionId.DATA),
        "mutable_globals": sum(g.mutable for g in module.globals),
        "table_elements": sum(table.minimum for table in module.tables),
        "has_tokenizer": module.has_tokenizer,
        "has_start_function": module.start is not None,
    }


def _describe_export(module: WasmModule, name: str, kind: ExternKind, index: int) -> str:
    return f"{name}{module.functions[index]}" if kind is ExternKind.FUNCTION else f"{name} ({kind.name.lower()})"


def _inspect_component(data: bytes) -> dict[str, Any]:
    outline = parse_component(data)
    return {
        "kind": "component",
        "sections": [{"name": str(number), "size_bytes": size} for number, size in outline.sections],
        "imports": list(outline.imports),
        "exports": list(outline.exports),
    }


def _inspect_compiled(data: bytes) -> dict[str, Any]:
    sections = read_sections(data)
    metadata = next((s for s in sections if s.name == METADATA_SECTION), None)
    version = "unknown"
    if metadata is not None:  # u8 format, u8 length, then Wasmtime's version
        raw = data[metadata.offset : metadata.offset + metadata.size_bytes]
        if len(raw) > 2 and len(raw) >= 2 + raw[1]:
            version = raw[2 : 2 + raw[1]].decode(errors="replace")
    return {
        "kind": "compiled guest",
        "sections": [{"name": s.name, "size_bytes": s.size_bytes} for s in sections],
        "wasmtime": version,
        "identity_here": guest_identity(),
    }


def report_lines(report: dict[str, Any]) -> list[str]:
    """``report`` as text."""
    lines = []
    for name, value in report.items():
        label = name.replace("_", " ")
        if name == "sections":
            lines.append("sections")
            lines += [f"  {section['size_bytes']:>12,} bytes  {section['name']}" for section in value]
        elif isinstance(value, list):
            lines.append(label if value else f"{label:<20} none")
            lines += [f"  {item}" for item in value]
        elif isinstance(value, dict):
            lines.append(label)
            lines += [f"  {key:<18} {item}" for key, item in value.items()]
        elif name.endswith("_bytes"):
            lines.append(f"{label.removesuffix(' bytes'):<20} {value:,} bytes")
        else:
            lines.append(f"{label:<20} {'yes' if value is True else 'no' if value is False else value}")
    return lines
