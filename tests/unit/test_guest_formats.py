"""Parsers of components and compiled guests: arbitrary bytes give a value or an error of ours, nothing else."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from guests import component_format
from guests.component_format import parse_component
from guests.elf_sections import HEADER, MAGIC, SECTION, read_sections
from guests.errors import GuestError, GuestIncompatible, GuestModuleRefused
from guests.inspection import inspect_guest
from guests.wasm_format import PREAMBLE


@given(st.binary(max_size=300))
def test_any_component_is_parsed_or_refused(tail: bytes) -> None:
    """Whatever follows the preamble."""
    try:
        outline = parse_component(component_format.PREAMBLE + tail)
    except GuestModuleRefused:
        return
    assert sum(size for _, size in outline.sections) <= len(tail)


@given(st.lists(st.tuples(st.sampled_from([10, 11]), st.binary(max_size=40)), max_size=6))
def test_any_import_or_export_section_is_parsed_or_refused(sections: list[tuple[int, bytes]]) -> None:
    """Well-framed sections with arbitrary content reach the parsers of imports and exports."""
    component = component_format.PREAMBLE + b"".join(bytes([n, len(body)]) + body for n, body in sections)
    try:
        parse_component(component)
    except GuestModuleRefused:
        return


@given(
    st.integers(0, 2**64 - 1) | st.integers(0, 600),
    st.sampled_from([SECTION.size, 0, 65_535]),
    st.integers(0, 65_535) | st.integers(0, 8),
    st.integers(0, 65_535) | st.integers(0, 8),
    st.binary(max_size=400),
)
def test_any_elf_header_is_read_or_refused(table: int, entry: int, number: int, names: int, tail: bytes) -> None:
    """Offsets, sizes and counts of every kind stay inside the file."""
    identification = MAGIC.ljust(16, b"\0")
    code = HEADER.pack(identification, 3, 62, 1, 0, 0, table, 0, HEADER.size, 0, 0, entry, number, names) + tail
    try:
        sections = read_sections(code)
    except GuestIncompatible:
        return
    assert all(section.offset + section.size_bytes <= len(code) for section in sections if section.size_bytes)


@given(st.sampled_from([b"", MAGIC, PREAMBLE, component_format.PREAMBLE]), st.binary(max_size=200))
def test_inspecting_any_file_gives_a_report_or_an_error_of_ours(magic: bytes, tail: bytes) -> None:
    """Of whichever kind it claims to be."""
    try:
        report = inspect_guest(magic + tail)
    except GuestError:
        return
    assert report["size_bytes"] == len(magic + tail)
