"""Modules that attack while they are built: each is refused by a rule, or stopped by the confined process's limits."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import pytest
from guest_fixtures import output_program, toy_guest, wat_guest
from hostile_guests import hostile_guest

from guests.abi import ProgramKind
from guests.compile import compile_guest
from guests.confined_work import CompileTask, run_confined
from guests.confinement import WorkLimits
from guests.errors import GuestContractError, GuestError, GuestModuleRefused, GuestProcessError, GuestTrap
from guests.initialise import initialise_guest
from guests.module import MAX_CUSTOM_BYTES, MAX_FUNCTION_BYTES, MAX_FUNCTIONS, MAX_LOCALS, parse_module
from guests.shipped import toy_wasm
from guests.wasm_format import (
    PREAMBLE,
    Section,
    SectionId,
    encode_name,
    encode_u32,
    encode_vector,
    join_sections,
    split_sections,
)

MEBIBYTE = 1 << 20
GENEROUS = WorkLimits(wall_s=30.0, cpu_s=20)
SHORT_CPU = WorkLimits(wall_s=30.0, cpu_s=1)
SHORT_WALL = WorkLimits(wall_s=0.7, cpu_s=20)
LITTLE_MEMORY = WorkLimits(wall_s=30.0, cpu_s=20, data_bytes=160 * MEBIBYTE)


def with_section(wasm: bytes, number: SectionId, body: bytes) -> bytes:
    """The module with one section replaced or added."""
    kept = [section for section in split_sections(wasm) if section.id is not number or number is SectionId.CUSTOM]
    return join_sections([*kept, Section(number, body)])


def function_of(body: bytes) -> bytes:
    """A guest with one more function, of type 0 and without locals, whose code is ``body``."""
    module = PREAMBLE + b"\1\4\1\x60\0\0" + b"\3\2\1\0" + b"\5\3\1\0\1"
    code = b"\0" + body + b"\x0b"
    return with_section(module, SectionId.CODE, encode_vector([encode_u32(len(code)) + code]))


INIT_ATTACKS: dict[str, tuple[str, str, WorkLimits, type[GuestError], str]] = {
    "endless init, by the clock": ("", "(loop $l (br $l))", SHORT_WALL, GuestProcessError, "longer than its 0.7 s"),
    "endless init, by CPU": ("", "(loop $l (br $l))", SHORT_CPU, GuestProcessError, "1 s of CPU time"),
    "start function that loops": (
        "(func $start (loop $l (br $l))) (start $start)",
        "",
        SHORT_WALL,
        GuestProcessError,
        "longer than its 0.7 s",
    ),
    "start function that traps": ("(func $start (unreachable)) (start $start)", "", GENEROUS, GuestTrap, "unreachable"),
    "memory bomb beyond the process's memory": (
        "",
        """(drop (memory.grow (i32.const 8000)))
           (memory.fill (i32.const 65536) (i32.const 1) (i32.const 500000000)) (unreachable)""",
        LITTLE_MEMORY,
        GuestError,
        "outside|out of bounds|memory",
    ),
    "memory bomb beyond the instance's": (
        "",
        """(loop $l (br_if $l (i32.ne (memory.grow (i32.const 64)) (i32.const -1))))
           (drop (i32.load (i32.mul (memory.size) (i32.const 65536)))) (unreachable)""",
        GENEROUS,
        GuestTrap,
        "out of bounds memory access",
    ),
    "table bomb": (
        "(table $t 1 funcref)",
        """(loop $l (br_if $l (i32.ne (table.grow $t (ref.null func) (i32.const 1000)) (i32.const -1))))
           (table.set $t (table.size $t) (ref.null func))""",
        GENEROUS,
        GuestTrap,
        "out of bounds table access",
    ),
    "recursion": (
        "(func $r (param i32) (result i32) (i32.add (call $r (local.get 0)) (i32.const 1)))",
        "(drop (call $r (i32.const 0)))",
        GENEROUS,
        GuestTrap,
        "call stack exhausted",
    ),
    "log flood": (
        "",
        "(loop $l (call $log (i32.const 0) (i32.const 0) (i32.const 60000)) (br $l))",
        GENEROUS,
        GuestContractError,
        "more than 1000 lines",
    ),
}


@pytest.mark.parametrize("name", INIT_ATTACKS)
def test_threat_hostile_module(name: str) -> None:
    """Loops, bombs and floods at init end as errors that name the limit; this process is not touched by them."""
    declarations, init, limits, kind, reason = INIT_ATTACKS[name]
    with pytest.raises(kind, match=reason):
        initialise_guest(wat_guest(declarations, init=init), {}, [], limits=limits)
    assert initialise_guest(wat_guest(), {}, []).programs[ProgramKind.PREFILL] == output_program(ProgramKind.PREFILL)


@pytest.mark.parametrize(
    ("export", "attack", "reason"),
    [
        ("gp_abi", "(unreachable)", "gp_abi: wasm trap"),
        ("gp_abi", "(i32.const 2)", "ABI version 2"),
        ("gp_abi", "(i32.const -1)", "ABI version -1"),
        ("gp_init", "(unreachable)", "gp_init: wasm trap"),
        ("gp_init", "(i32.const -2147483648)", "code -2147483648"),
        ("gp_init", "(i32.const 0)", "recorded no PREFILL program"),
    ],
)
def test_an_abi_or_init_that_misbehaves_is_named(export: str, attack: str, reason: str) -> None:
    """Traps and wrong codes in the exports of the build."""
    wasm = hostile_guest(export, attack).replace(b"\x41\x00\x04\x7f", b"\x41\x01\x04\x7f")  # if (0) -> if (1)
    with pytest.raises(GuestError, match=reason):
        initialise_guest(wasm, {}, [])


def test_a_custom_section_bomb_is_refused() -> None:
    """Custom sections are bounded in number and in total size; those that are allowed never reach the compiler."""
    wasm = toy_wasm()
    chunk = encode_name("bomb") + bytes(MAX_CUSTOM_BYTES // 8)
    for _ in range(7):
        wasm = with_section(wasm, SectionId.CUSTOM, chunk)
    assert len(initialise_toy(wasm).baked_wasm) < MEBIBYTE
    with pytest.raises(GuestModuleRefused, match="custom sections of more than"):
        initialise_toy(with_section(wasm, SectionId.CUSTOM, chunk))


def initialise_toy(wasm: bytes) -> object:
    return initialise_guest(wasm, {"config": b"\x64\0\0\0"}, ["embed.weight", "lm_head.weight"])


def test_a_custom_section_with_a_hostile_name_is_an_error_and_not_a_crash() -> None:
    """A custom section whose own name is malformed is refused like everything else that is malformed."""
    for body in (b"", b"\xff", encode_u32(5000), b"\2\xff\xfe"):
        with pytest.raises(GuestModuleRefused):
            initialise_toy(with_section(toy_wasm(), SectionId.CUSTOM, body))


def test_huge_data_segments_are_built_or_refused_within_the_limits() -> None:
    """Forty MiB of data are a legal guest; a segment beyond the memory is a trap at start, not a write elsewhere."""
    legal = with_section(wat_guest(pages=640), SectionId.CUSTOM, encode_name("x"))
    data = b"\0\x41\0\x0b" + encode_u32(40 * MEBIBYTE) + bytes([7]) * (40 * MEBIBYTE)
    programs = next(section.body for section in split_sections(legal) if section.id is SectionId.DATA)
    both = encode_u32(2) + data + programs[1:]
    assert len(initialise_guest(with_section(legal, SectionId.DATA, both), {}, []).baked_wasm) > 40 * MEBIBYTE
    outside = b"\0\x41" + b"\xff\xff\x7b" + b"\x0b" + encode_u32(16) + bytes(16)  # at -65537
    with pytest.raises(GuestError, match="out of bounds memory access"):
        initialise_guest(with_section(wat_guest(), SectionId.DATA, encode_u32(2) + outside + programs[1:]), {}, [])


def test_many_functions_are_refused_or_compiled_within_the_limits() -> None:
    """One function more than allowed is refused by the parser; the most that are allowed compile in their time."""

    def functions(number: int) -> bytes:
        module = PREAMBLE + b"\1\4\1\x60\0\0" + b"\5\3\1\0\1"
        module = with_section(module, SectionId.FUNCTION, encode_u32(number) + bytes(number))
        return with_section(module, SectionId.CODE, encode_u32(number) + b"\2\0\x0b" * number)

    with pytest.raises(GuestModuleRefused, match="at most 100000"):
        parse_module(functions(MAX_FUNCTIONS + 1))
    with pytest.raises(GuestProcessError, match="1 s of CPU time"):
        compile_guest(functions(MAX_FUNCTIONS), limits=SHORT_CPU)


def test_code_that_is_expensive_to_compile_runs_into_the_cpu_limit() -> None:
    """Four MiB of one function: the compiler is stopped, and the caller hears why."""
    arithmetic = b"\x41\0" + b"\x41\1\x6a" * ((MAX_FUNCTION_BYTES - 100) // 3) + b"\x1a"
    with pytest.raises(GuestProcessError, match=r"1 s of CPU time|implementation limit|aborted"):
        compile_guest(function_of(arithmetic), limits=SHORT_CPU)


def test_deeply_nested_code_does_not_overflow_the_compiler() -> None:
    """A million nested blocks end as compiled code, as a refusal or as a dead child; never as a dead caller."""
    nested = b"\x02\x40" * 1_000_000 + b"\x0b" * 1_000_000
    try:
        code = compile_guest(function_of(nested), limits=GENEROUS)
    except GuestError as error:
        code = str(error).encode()
    assert code


BODIES: dict[str, tuple[bytes, str]] = {
    "one body too few": (encode_u32(0), "another number of bodies"),
    "one body too many": (encode_u32(2) + b"\2\0\x0b" * 2, "another number of bodies"),
    "body of 5 MiB": (encode_u32(1) + encode_u32(5 * MEBIBYTE) + bytes(100), "at most 4194304"),
    "body cut short": (encode_u32(1) + encode_u32(50) + b"\0\x0b", "50 bytes wanted|bytes wanted"),
    "empty body": (encode_u32(1) + b"\0", "in 0 bytes|unexpected end|ends within"),
    "body that ends within its locals": (encode_u32(1) + b"\3\1\1\x7f", "ends within its locals"),
    "four billion locals": (encode_u32(1) + b"\x09\1\xff\xff\xff\xff\x0f\x7f\x0b\0", f"at most {MAX_LOCALS}"),
    "a billion groups of locals": (encode_u32(1) + b"\x20" + encode_u32(10**9) + bytes(40), "groups of locals"),
    "locals of no type": (encode_u32(1) + b"\4\1\1\x40\x0b", "value type 0x40"),
}


@pytest.mark.parametrize("name", BODIES)
def test_hostile_code_sections_are_refused_by_our_own_parser(name: str) -> None:
    """Sizes and locals of function bodies are checked before Wasmtime sees them."""
    body, reason = BODIES[name]
    with pytest.raises(GuestModuleRefused, match=reason):
        parse_module(with_section(function_of(b""), SectionId.CODE, body))


def test_the_child_reports_its_own_limits() -> None:
    """Too little memory, or too little room for the result: an error of the build, with the limit in it."""
    baked = toy_guest().baked_wasm
    with pytest.raises(GuestProcessError, match="MiB of memory"):
        compile_guest(baked, limits=WorkLimits(wall_s=20.0, cpu_s=10, data_bytes=8 * MEBIBYTE))
    with pytest.raises(GuestProcessError, match="File too large"):
        compile_guest(baked, limits=WorkLimits(wall_s=20.0, cpu_s=10, output_bytes=4096))


FAKES: dict[str, tuple[str, str]] = {
    "crash": ("kill -SEGV $$", "crashed with SIGSEGV"),
    "killed": ("kill -KILL $$", "was killed"),
    "exit code": ("echo so sorry >&2; exit 3", "ended with code 3: so sorry"),
    "silence": ("exit 0", "malformed reply"),
    "noise": ("head -c 100000 /dev/urandom", "malformed reply"),
    "length of 4 GiB": (r"printf '\377\377\377\377'", "malformed reply: header of 4294967295 bytes"),
    "sizes that lie": (
        # {"type": "done", "sizes": [2**31 - 1], "layers": []}
        r"printf '\036\000\000\000\203\244type\244done\245sizes\221\316\177\377\377\377\246layers\220'",
        "malformed reply",
    ),
}


@pytest.mark.parametrize("name", FAKES)
def test_a_child_that_crashes_or_lies_is_one_error(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever a taken-over child does with its output, the parent gets a GuestProcessError."""
    script, reason = FAKES[name]
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(GuestProcessError, match=reason):
        run_confined(CompileTask((4,)), [b"wasm"], GENEROUS)


def test_children_leave_nothing_behind() -> None:
    """Descriptors and children are gone after a success, a refusal and a kill."""
    before, children = sorted(os.listdir("/proc/self/fd")), child_pids()
    compile_guest(toy_guest().baked_wasm)
    with pytest.raises(GuestModuleRefused):
        compile_guest(function_of(b"\xfe"))
    with pytest.raises(GuestProcessError):
        compile_guest(toy_guest().baked_wasm, limits=WorkLimits(wall_s=0.01, cpu_s=5))
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert child_pids() <= children  # zombies included; the suite's own servers may be among them, or end


def child_pids() -> set[str]:
    """Children of this process, also those that have ended and were not reaped."""
    found: set[str] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that ended just now
            found.update((task / "children").read_text().split())
    return found
