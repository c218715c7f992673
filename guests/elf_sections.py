"""Section names and sizes of a compiled guest, which is an ELF file. For showing: nothing is loaded by them.

Source: System V ABI, chapter 4 (ELF-64 header and section header).
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from guests.errors import GuestIncompatible

MAGIC: Final = b"\x7fELF\x02\x01"  # 64 bits, little-endian
HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
SECTION: Final = struct.Struct("<IIQQQQIIQQ")
TYPE_NO_BITS: Final = 8
MAX_SECTIONS: Final = 1_000


class ElfSection(NamedTuple):
    """One section; ``offset`` and ``size_bytes`` lie inside the file."""

    name: str
    offset: int
    size_bytes: int


def read_sections(code: bytes) -> list[ElfSection]:
    """Named sections in file order.

    Raises:
        GuestIncompatible: not a 64-bit little-endian ELF file, or malformed.
    """
    if len(code) < HEADER.size or not code.startswith(MAGIC):
        raise GuestIncompatible("not a compiled guest: no ELF header")
    fields = HEADER.unpack_from(code)
    table_at, entry_bytes, number, names_index = fields[6], fields[11], fields[12], fields[13]
    if (
        entry_bytes != SECTION.size
        or number > MAX_SECTIONS
        or names_index >= number
        or table_at + number * entry_bytes > len(code)
    ):
        raise GuestIncompatible("not a compiled guest: its section table is malformed")
    entries = [SECTION.unpack_from(code, table_at + i * SECTION.size) for i in range(number)]
    names = _content(code, entries[names_index])
    sections = [
        ElfSection(_name(names, entry[0]), entry[4], 0 if entry[1] == TYPE_NO_BITS else len(_content(code, entry)))
        for entry in entries[1:]  # the first is the null section
    ]
    return sorted(sections, key=lambda section: section.offset)


def _content(code: bytes, entry: tuple[int, ...]) -> memoryview:
    offset, size = entry[4], entry[5]
    if entry[1] != TYPE_NO_BITS and offset + size > len(code):
        raise GuestIncompatible("not a compiled guest: a section lies outside the file")
    return memoryview(code)[offset : offset + size]


def _name(names: memoryview, position: int) -> str:
    return bytes(names[position : position + 100]).partition(b"\0")[0].decode(errors="replace")
