"""The module checker: what it accepts, and that it refuses every hostile or unrestorable module with a reason."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guests import abi
from guests.errors import GuestModuleRefused
from guests.module import MAX_MODULE_BYTES, parse_guest, parse_module
from guests.shipped import GUESTS_FOLDER, toy_wasm
from guests.wasm_format import (
    PREAMBLE,
    Reader,
    Section,
    SectionId,
    encode_name,
    encode_signed,
    encode_u32,
    encode_vector,
    join_sections,
    split_sections,
)

I32, I64, F32, V128, FUNCREF, EXTERNREF = b"\x7f", b"\x7e", b"\x7d", b"\x7b", b"\x70", b"\x6f"
ZERO = b"\x41\x00\x0b"  # i32.const 0; end


def section(number: int, items: Sequence[bytes]) -> bytes:
    """One section that holds a vector."""
    return raw_section(number, encode_vector(list(items)))


def raw_section(number: int, body: bytes) -> bytes:
    """One section."""
    return bytes([number]) + encode_u32(len(body)) + body


def function_type(params: bytes = b"", results: bytes = b"") -> bytes:
    """One entry of the type section."""
    return b"\x60" + encode_u32(len(params)) + params + encode_u32(len(results)) + results


def imported(name: str, kind: int = 0, tail: bytes = b"\0", namespace: str = "glowplug") -> bytes:
    """One entry of the import section."""
    return encode_name(namespace) + encode_name(name) + bytes([kind]) + tail


MEMORY = section(5, [b"\0\1"])
TYPES = section(1, [function_type()])
ONE_FUNCTION = section(3, [b"\0"])
CODE = section(10, [b"\2\0\x0b"])

HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "not a WebAssembly core module"),
    "component": (b"\0asm\x0d\0\1\0", "components are not guests"),
    "cut inside a section": (PREAMBLE + b"\5\7\1", "7 bytes wanted"),
    "unknown section": (PREAMBLE + raw_section(14, b""), "unknown section 14"),
    "endless number": (PREAMBLE + b"\5" + b"\x80" * 9, "longer than 5 bytes"),
    "number over 32 bits": (PREAMBLE + b"\5\xff\xff\xff\xff\x7f", "exceeds 32 bits"),
    "sections out of order": (PREAMBLE + MEMORY + TYPES, "out of order"),
    "repeated section": (PREAMBLE + MEMORY + MEMORY, "repeated"),
    "too many sections": (PREAMBLE + raw_section(0, b"\0") * 300, "more than 256 sections"),
    "bytes after a section's end": (PREAMBLE + raw_section(5, b"\1\0\1\0"), "1 bytes after the end"),
    "no memory": (PREAMBLE + TYPES, "no memory of its own"),
    "two memories": (PREAMBLE + section(5, [b"\0\1", b"\0\1"]), "exactly one memory"),
    "shared memory": (PREAMBLE + section(5, [b"\3\1\1"]), "shared"),
    "64-bit memory": (PREAMBLE + section(5, [b"\4\1"]), "64-bit"),
    "custom page size": (PREAMBLE + section(5, [b"\x08\1\0"]), "page size"),
    "huge memory": (PREAMBLE + section(5, [b"\0" + encode_u32(65_536)]), "at most 8192"),
    "a billion types": (PREAMBLE + raw_section(1, encode_u32(10**9)), "at most 10000"),
    "more types than bytes": (PREAMBLE + raw_section(1, encode_u32(9_000)), "9000 types in 0 bytes"),
    "struct type": (PREAMBLE + section(1, [b"\x5f\0"]), "only plain function types"),
    "recursive types": (PREAMBLE + section(1, [b"\x4e\0"]), "only plain function types"),
    "externref parameter": (PREAMBLE + section(1, [function_type(EXTERNREF)]), "value type 0x6f"),
    "imported memory": (PREAMBLE + section(2, [imported("m", 2, b"\0\1")]), "is not a function"),
    "imported global": (PREAMBLE + section(2, [imported("g", 3, b"\x7f\0")]), "is not a function"),
    "import of an unknown type": (PREAMBLE + section(2, [imported("log")]), "type 0 of 0"),
    "import name not UTF-8": (PREAMBLE + section(2, [b"\1\xff\1a\0\0"]), "not UTF-8"),
    "endless name": (PREAMBLE + section(2, [encode_u32(70_000)]), "name of 70000 bytes"),
    "function of an unknown type": (PREAMBLE + TYPES + section(3, [b"\5"]), "type 5 of 1"),
    "externref table": (PREAMBLE + section(4, [EXTERNREF + b"\0\1"]), "plain funcref table"),
    "table with an initialiser": (PREAMBLE + section(4, [b"\x40\0" + FUNCREF + b"\0\1"]), "plain funcref"),
    "huge table": (PREAMBLE + section(4, [FUNCREF + b"\0" + encode_u32(10**6)]), "at most 65536"),
    "mutable funcref global": (
        PREAMBLE + MEMORY + section(6, [FUNCREF + b"\1\xd0\x70\x0b"]),
        "holds a reference",
    ),
    "shared global": (PREAMBLE + MEMORY + section(6, [I32 + b"\2" + ZERO]), "mutability 0x2"),
    "call in an initialiser": (PREAMBLE + MEMORY + section(6, [I32 + b"\0\x10\0\x0b"]), "opcode 0x10"),
    "initialiser without an end": (PREAMBLE + MEMORY + section(6, [I32 + b"\0\x41\0"]), "unexpected end"),
    "export out of range": (PREAMBLE + MEMORY + section(7, [encode_name("f") + b"\0\0"]), "out of range"),
    "export of a tag": (PREAMBLE + MEMORY + section(7, [encode_name("f") + b"\4\0"]), "unknown kind"),
    "the snapshotter's export name": (
        PREAMBLE + MEMORY + section(7, [encode_name("glowplug:memory") + b"\2\0"]),
        "are the snapshotter's",
    ),
    "start out of range": (PREAMBLE + MEMORY + raw_section(8, b"\3"), "function 3 of 0"),
    "passive elements": (
        PREAMBLE + TYPES + ONE_FUNCTION + MEMORY + section(9, [b"\1\0\1\0"]) + CODE,
        "passive element segment",
    ),
    "element out of range": (PREAMBLE + MEMORY + section(9, [b"\0" + ZERO + b"\1\7"]), "function 7 of 0"),
    "elements of another kind": (PREAMBLE + MEMORY + section(9, [b"\3\1\0"]), "does not hold functions"),
    "passive data": (PREAMBLE + MEMORY + section(11, [b"\1\1x"]), "passive data segment"),
    "data cut short": (PREAMBLE + MEMORY + section(11, [b"\0" + ZERO + b"\x20x"]), "32 bytes wanted"),
    "exception tag": (PREAMBLE + TYPES + MEMORY + section(13, [b"\0\0"]), "exception tags"),
}


@pytest.mark.parametrize(("wasm", "reason"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_modules_are_refused_with_a_reason(wasm: bytes, reason: str) -> None:
    """Each module that is malformed, too large or not restorable is refused, and the message says why."""
    with pytest.raises(GuestModuleRefused, match=re.escape(reason)):
        parse_module(wasm)


def test_an_oversized_module_is_refused_before_it_is_read() -> None:
    """The size cap comes first, so that a huge file costs nothing."""
    with pytest.raises(GuestModuleRefused, match="at most"):
        parse_module(bytes(MAX_MODULE_BYTES + 1))


def abi_module(
    *, imports: Sequence[bytes] = (), resume_type: int = 1, extra: Sequence[bytes] = (), drop: str = ""
) -> bytes:
    """A module with the lifecycle exports; the arguments break it in one place."""
    types = [
        function_type(b"", I32),
        function_type(I64, I32),
        function_type(V128, I32),
        function_type(I32, b""),
    ]
    n = len(imports)
    functions = {"gp_abi": 0, "gp_init": 0, "gp_resume": resume_type}
    exports = [encode_name("memory") + b"\2\0"] if drop != "memory" else []
    exports += [encode_name(name) + b"\0" + bytes([n + i]) for i, name in enumerate(functions) if name != drop]
    return (
        PREAMBLE
        + section(1, types)
        + section(2, imports)
        + section(3, [bytes([index]) for index in functions.values()])
        + MEMORY
        + section(7, [*exports, *extra])
    )


ABI_BREAKS: dict[str, tuple[bytes, str]] = {
    "wasi import": (
        abi_module(imports=[imported("fd_write", namespace="wasi_snapshot_preview1")]),
        "import wasi_snapshot_preview1.fd_write",
    ),
    "unknown import": (abi_module(imports=[imported("clock")]), "import glowplug.clock"),
    "import of another type": (
        abi_module(imports=[imported("log", tail=b"\3")]),
        "import log is (i32): the ABI has (i32, i32, i32)",
    ),
    "memory not exported": (abi_module(drop="memory"), "does not export its memory"),
    "init missing": (abi_module(drop="gp_init"), "does not export the function gp_init() -> i32"),
    "vector parameter at the boundary": (abi_module(resume_type=2), "export gp_resume is (v128) -> i32"),
    "result missing": (abi_module(resume_type=3), "export gp_resume is (i32)"),
    "unknown gp_ export": (abi_module(extra=[encode_name("gp_tokenise") + b"\0\0"]), "not in the ABI"),
    "half a tokeniser": (
        abi_module(extra=[encode_name("gp_tokenize") + b"\0\0"]),
        "does not export the function gp_buffer",
    ),
    "init is not a function": (
        abi_module(drop="gp_init", extra=[encode_name("gp_init") + b"\2\0"]),
        "does not export the function gp_init",
    ),
}


@pytest.mark.parametrize(("wasm", "reason"), ABI_BREAKS.values(), ids=ABI_BREAKS.keys())
def test_guests_that_break_the_abi_are_refused(wasm: bytes, reason: str) -> None:
    """Imports and exports must be the ABI's by name and by type."""
    with pytest.raises(GuestModuleRefused, match=re.escape(reason)):
        parse_guest(wasm)


def test_the_shipped_toy_is_accepted() -> None:
    """The example guest has no tokeniser, imports only the ABI and has one mutable global, its stack pointer."""
    module = parse_guest(toy_wasm())
    assert not module.has_tokenizer
    assert {function.name for function in module.imports} == {"log", "asset_read", "tensor", "program"}
    assert [g.mutable for g in module.globals] == [True]


def test_sections_survive_splitting_and_joining() -> None:
    """Splitting and joining give the same module, custom sections moved to the end."""
    wasm = toy_wasm()
    assert join_sections(split_sections(wasm)) == wasm
    shuffled = [Section(SectionId.CUSTOM, encode_name("x")), *reversed(split_sections(wasm))]
    assert join_sections(shuffled) == wasm + raw_section(0, encode_name("x"))


@given(st.integers(0, 2**32 - 1))
def test_unsigned_numbers_round_trip(value: int) -> None:
    """encode_u32 and Reader.u32 are inverse."""
    reader = Reader(encode_u32(value), "test")
    assert reader.u32() == value
    reader.expect_end()


@given(st.integers(-(2**63), 2**63 - 1))
def test_signed_numbers_are_minimal_and_terminated(value: int) -> None:
    """encode_signed ends at the first byte without continuation bit and decodes to the value."""
    data = encode_signed(value)
    decoded = sum((byte & 0x7F) << (7 * i) for i, byte in enumerate(data))
    if data[-1] & 0x40:
        decoded -= 1 << (7 * len(data))
    assert decoded == value
    assert all(byte & 0x80 for byte in data[:-1])
    assert not data[-1] & 0x80


@given(st.binary(max_size=300))
def test_random_sections_never_raise_anything_else(tail: bytes) -> None:
    """Whatever follows the preamble is parsed or refused; nothing else can happen."""
    try:
        parse_module(PREAMBLE + tail)
    except GuestModuleRefused:
        pass


@given(st.data())
def test_damaged_guests_never_raise_anything_else(data: st.DataObject) -> None:
    """A real guest with some bytes overwritten or cut off is parsed or refused; nothing else can happen."""
    wasm = bytearray(toy_wasm())
    for _ in range(data.draw(st.integers(1, 4))):
        wasm[data.draw(st.integers(0, len(wasm) - 1))] = data.draw(st.integers(0, 255))
    try:
        parse_guest(bytes(wasm[: data.draw(st.integers(0, len(wasm)))]))
    except GuestModuleRefused:
        pass


HEADER_NAMES: dict[type[Enum], dict[str, str]] = {
    abi.Opcode: {f"GP_{member.name}": member.name for member in abi.Opcode},
    abi.ProgramKind: {"GP_PREFILL": "PREFILL", "GP_DECODE": "DECODE", "GP_ENCODE": "ENCODE"},
    abi.SequenceEnd: {
        "GP_FINISH_NONE": "NONE",
        "GP_FINISH_STOP_TOKEN": "STOP_TOKEN",
        "GP_FINISH_STOP_STRING": "STOP_STRING",
    },
    abi.TokenizeFlag: {"GP_ADD_SPECIAL": "ADD_SPECIAL", "GP_PARSE_SPECIAL": "PARSE_SPECIAL"},
    abi.SequenceFlag: {
        "GP_IGNORE_STOP_TOKENS": "IGNORE_STOP_TOKENS",
        "GP_SHOW_SPECIAL": "SHOW_SPECIAL",
        "GP_KEEP_LEADING_SPACE": "KEEP_LEADING_SPACE",
    },
}


def test_the_c_header_and_the_python_numbers_agree() -> None:
    """Every enumerator of sdk/glowplug.h equals its twin in guests/abi.py."""
    header = (GUESTS_FOLDER / "sdk" / "glowplug.h").read_text()
    numbers = {name: int(value) for name, value in re.findall(r"\b(GP_[A-Z0-9_]+) = (\d+)", header)}
    for enum, names in HEADER_NAMES.items():
        assert set(names.values()) == set(enum.__members__)
        for c_name, python_name in names.items():
            assert numbers[c_name] == enum[python_name].value
    assert f"#define GP_ABI_VERSION {abi.ABI_VERSION}\n" in header
    assert f"#define GP_NO_VALUE 0x{abi.NO_VALUE:X}u\n" in header
    assert f"#define GP_NO_TENSOR 0x{abi.NO_TENSOR:X}u\n" in header
