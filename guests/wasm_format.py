"""The WebAssembly binary format as far as the module checker and the snapshotter need it.

Source: WebAssembly Core Specification 2.0, chapter 5 (binary format); section ids 5.5.2, LEB128 5.2.2.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import Final, NamedTuple

from guests.errors import GuestModuleRefused

PREAMBLE: Final = b"\0asm\1\0\0\0"
WASM_PAGE_BYTES: Final = 65_536
MAX_NAME_BYTES: Final = 1_024
MAX_SECTIONS: Final = 256  # of which custom sections may be many


class SectionId(IntEnum):
    """Sections of a core module."""

    CUSTOM = 0
    TYPE = 1
    IMPORT = 2
    FUNCTION = 3
    TABLE = 4
    MEMORY = 5
    GLOBAL = 6
    EXPORT = 7
    START = 8
    ELEMENT = 9
    CODE = 10
    DATA = 11
    DATA_COUNT = 12
    TAG = 13


# Known sections come at most once each and in this order.
SECTION_ORDER: Final = (
    SectionId.TYPE,
    SectionId.IMPORT,
    SectionId.FUNCTION,
    SectionId.TABLE,
    SectionId.MEMORY,
    SectionId.TAG,
    SectionId.GLOBAL,
    SectionId.EXPORT,
    SectionId.START,
    SectionId.ELEMENT,
    SectionId.DATA_COUNT,
    SectionId.CODE,
    SectionId.DATA,
)


class ExternKind(IntEnum):
    """What an import or export is."""

    FUNCTION = 0
    TABLE = 1
    MEMORY = 2
    GLOBAL = 3
    TAG = 4


class ValueType(IntEnum):
    """Value types that glowplug understands; every other one is refused."""

    I32 = 0x7F
    I64 = 0x7E
    F32 = 0x7D
    F64 = 0x7C
    V128 = 0x7B
    FUNCREF = 0x70


class Section(NamedTuple):
    """One section; ``body`` is without id and size."""

    id: SectionId
    body: bytes


class Reader:
    """Cursor over untrusted bytes. Every read is bounds-checked and refuses the module on failure."""

    __slots__ = ("_data", "_what", "position")

    def __init__(self, data: bytes, what: str) -> None:
        self._data = data
        self._what = what
        self.position = 0

    @property
    def remaining(self) -> int:
        """Bytes not yet read."""
        return len(self._data) - self.position

    def refuse(self, reason: str) -> GuestModuleRefused:
        """The exception to raise, naming where the reader stands."""
        return GuestModuleRefused(f"{self._what}, byte {self.position}: {reason}")

    def byte(self) -> int:
        """The next byte."""
        if self.position >= len(self._data):
            raise self.refuse("unexpected end")
        value = self._data[self.position]
        self.position += 1
        return value

    def take(self, size: int) -> bytes:
        """The next ``size`` bytes."""
        if size > self.remaining:
            raise self.refuse(f"{size} bytes wanted, {self.remaining} left")
        start = self.position
        self.position += size
        return self._data[start : self.position]

    def skip(self, size: int) -> None:
        """Pass over ``size`` bytes."""
        if size > self.remaining:
            raise self.refuse(f"{size} bytes wanted, {self.remaining} left")
        self.position += size

    def u32(self) -> int:
        """An unsigned LEB128 number of at most 32 bits."""
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
            if shift >= 35:
                raise self.refuse("number longer than 5 bytes")
        if value > 0xFFFF_FFFF:
            raise self.refuse("number exceeds 32 bits")
        return value

    def skip_leb(self, max_bytes: int) -> None:
        """Pass over a LEB128 number of either sign."""
        for _ in range(max_bytes):
            if self.byte() < 0x80:
                return
        raise self.refuse(f"number longer than {max_bytes} bytes")

    def count(self, limit: int, what: str) -> int:
        """Length of a vector, checked against ``limit`` and the bytes that are left before anything is built."""
        value = self.u32()
        if value > limit:
            raise self.refuse(f"{value} {what}: at most {limit}")
        if value > self.remaining:
            raise self.refuse(f"{value} {what} in {self.remaining} bytes")
        return value

    def name(self) -> str:
        """A UTF-8 name."""
        size = self.u32()
        if size > MAX_NAME_BYTES:
            raise self.refuse(f"name of {size} bytes: at most {MAX_NAME_BYTES}")
        try:
            return self.take(size).decode()
        except UnicodeDecodeError as error:
            raise self.refuse("name is not UTF-8") from error

    def value_type(self) -> ValueType:
        """A value type."""
        byte = self.byte()
        try:
            return ValueType(byte)
        except ValueError as error:
            raise self.refuse(f"value type {byte:#x} is not i32, i64, f32, f64, v128 or funcref") from error

    def constant_expression(self) -> bytes:
        """The bytes of an initialiser up to and including its ``end``; only constant instructions."""
        start = self.position
        while (opcode := self.byte()) != 0x0B:
            self._skip_constant_operand(opcode)
        return self._data[start : self.position]

    def _skip_constant_operand(self, opcode: int) -> None:
        match opcode:
            case 0x41:  # i32.const
                self.skip_leb(5)
            case 0x42:  # i64.const
                self.skip_leb(10)
            case 0x43:  # f32.const
                self.take(4)
            case 0x44:  # f64.const
                self.take(8)
            case 0x23 | 0xD2:  # global.get, ref.func
                self.u32()
            case 0xD0:  # ref.null
                self.value_type()
            case 0xFD:
                if self.u32() != 12:  # v128.const
                    raise self.refuse("vector instruction in a constant expression")
                self.take(16)
            case 0x6A | 0x6B | 0x6C | 0x7C | 0x7D | 0x7E:  # i32/i64 add, sub, mul
                pass
            case _:
                raise self.refuse(f"opcode {opcode:#x} in a constant expression")

    def expect_end(self) -> None:
        """Refuse bytes after the last element."""
        if self.remaining:
            raise self.refuse(f"{self.remaining} bytes after the end")


def split_sections(wasm: bytes) -> list[Section]:
    """Sections in file order; known ones are checked to be unique and ordered.

    Raises:
        GuestModuleRefused: not a core module, or its framing is malformed.
    """
    reader = Reader(wasm, "module")
    if wasm[: len(PREAMBLE)] != PREAMBLE:
        raise reader.refuse("not a WebAssembly core module of version 1 (components are not guests)")
    reader.take(len(PREAMBLE))
    sections: list[Section] = []
    rank = -1
    while reader.remaining:
        number = reader.byte()
        if number > SectionId.TAG:
            raise reader.refuse(f"unknown section {number}")
        section = SectionId(number)
        sections.append(Section(section, reader.take(reader.u32())))
        if len(sections) > MAX_SECTIONS:
            raise reader.refuse(f"more than {MAX_SECTIONS} sections")
        if section is not SectionId.CUSTOM:
            if SECTION_ORDER.index(section) <= rank:
                raise reader.refuse(f"{section.name} section is out of order or repeated")
            rank = SECTION_ORDER.index(section)
    return sections


def join_sections(sections: Iterable[Section]) -> bytes:
    """A module of ``sections``, known ones put into the order the format asks for, custom ones last."""
    ordered = sorted(
        sections, key=lambda s: SECTION_ORDER.index(s.id) if s.id is not SectionId.CUSTOM else len(SECTION_ORDER)
    )
    parts = [PREAMBLE]
    for section in ordered:
        parts += [bytes([section.id]), encode_u32(len(section.body)), section.body]
    return b"".join(parts)


def encode_u32(value: int) -> bytes:
    """Unsigned LEB128."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def encode_signed(value: int) -> bytes:
    """Signed LEB128."""
    out = bytearray()
    while not -0x40 <= value < 0x40:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value & 0x7F)
    return bytes(out)


def encode_name(name: str) -> bytes:
    """A name with its length."""
    data = name.encode()
    return encode_u32(len(data)) + data


def encode_vector(items: list[bytes]) -> bytes:
    """A vector of encoded items."""
    return encode_u32(len(items)) + b"".join(items)
