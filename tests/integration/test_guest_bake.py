"""Initialise, capture, bake, compile, map: a restored guest continues exactly where its init stopped."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from guest_fixtures import compiled, output_program, sealed, toy_guest, wat_guest
from hypothesis import given, settings
from hypothesis import strategies as st

from guests.abi import NO_VALUE, Opcode, ProgramKind
from guests.bake import CapturedState, bake
from guests.compile import compile_guest, compile_in_process
from guests.errors import GuestContractError, GuestModuleRefused, GuestTrap, ProgramError
from guests.initialise import LogLevel, initialise_guest
from guests.module import parse_module
from guests.program import decode_program
from guests.runtime import GuestEngine, GuestInstance
from guests.shipped import toy_wasm

MEBIBYTE = 1 << 20
WASM_PAGE_BYTES = 65_536

# Every kind of mutable state that a core module has, changed at init; the query reads it back.
STATEFUL = wat_guest(
    """
    (type $answer (func (result i64)))
    (table $t 3 20 funcref) (table $empty 0 funcref)
    (elem (table $t) (i32.const 0) func $one $two) (elem declare func $three)
    (func $one (result i64) (i64.const 1))
    (func $two (result i64) (i64.const 2))
    (func $three (result i64) (i64.const 3))
    (global $i32 (mut i32) (i32.const 0)) (global $i64 (mut i64) (i64.const 0))
    (global $f32 (mut f32) (f32.const 0)) (global $f64 (mut f64) (f64.const 0))
    (global $v128 (mut v128) (v128.const i64x2 0 0)) (global $constant i32 (i32.const 77))
    (data (i32.const 100) "\\07")
    (func $start (i32.store (i32.const 0) (i32.add (i32.load (i32.const 0)) (i32.const 1))))
    (start $start)
    (func $local_reference (result i32) (local $f funcref)
      (local.set $f (ref.func $three)) (ref.is_null (local.get $f)))
    """,
    init="""
    (global.set $i32 (i32.const -5)) (global.set $i64 (i64.const -6000000000))
    (global.set $f32 (f32.const 1.5)) (global.set $f64 (f64.const -2.25))
    (global.set $v128 (v128.const i64x2 11 -12))
    (table.set $t (i32.const 0) (ref.null func)) (table.set $t (i32.const 2) (ref.func $three))
    (drop (table.grow $t (ref.null func) (i32.const 4)))
    (table.set $t (i32.const 6) (ref.func $two))
    (drop (memory.grow (i32.const 3)))
    (i64.store (i32.const 200000) (i64.const 123456789))
    (i32.store8 (i32.const 100) (i32.const 8))
    """,
    query="""
    (if (i32.eq (local.get $which) (i32.const 0)) (then (return (i64.extend_i32_s (global.get $i32)))))
    (if (i32.eq (local.get $which) (i32.const 1)) (then (return (global.get $i64))))
    (if (i32.eq (local.get $which) (i32.const 2))
      (then (return (i64.extend_i32_s (i32.reinterpret_f32 (global.get $f32))))))
    (if (i32.eq (local.get $which) (i32.const 3)) (then (return (i64.reinterpret_f64 (global.get $f64)))))
    (if (i32.eq (local.get $which) (i32.const 4))
      (then (return (i64x2.extract_lane 1 (global.get $v128)))))
    (if (i32.eq (local.get $which) (i32.const 5)) (then (return (i64.extend_i32_u (table.size $t)))))
    (if (i32.eq (local.get $which) (i32.const 6)) (then (return (i64.extend_i32_u (memory.size)))))
    (if (i32.eq (local.get $which) (i32.const 7)) (then (return (i64.load (i32.const 200000)))))
    (if (i32.eq (local.get $which) (i32.const 8)) (then (return (i64.load32_u (i32.const 0)))))
    (if (i32.eq (local.get $which) (i32.const 9)) (then (return (i64.load8_u (i32.const 100)))))
    (if (i32.eq (local.get $which) (i32.const 10)) (then (return (i64.extend_i32_u (global.get $constant)))))
    (if (i32.eq (local.get $which) (i32.const 11))
      (then (global.set $i32 (i32.add (global.get $i32) (i32.const 1)))
            (return (i64.extend_i32_s (global.get $i32)))))
    (call_indirect $t (type $answer) (i32.sub (local.get $which) (i32.const 20)))
    """,
)
ANSWERS: Mapping[int, int] = {
    0: -5,
    1: -6_000_000_000,
    2: struct.unpack("<i", struct.pack("<f", 1.5))[0],
    3: struct.unpack("<q", struct.pack("<d", -2.25))[0],
    4: -12,
    5: 7,
    6: 4,
    7: 123_456_789,
    8: 1,  # the start function ran once, at build
    9: 8,
    10: 77,
    21: 2,
    22: 3,
    26: 2,
}


@contextmanager
def restored(baked_wasm: bytes) -> Iterator[GuestInstance]:
    """An instance from a sealed, compiled file, as a worker makes it."""
    with sealed(compiled(baked_wasm)) as path, GuestEngine() as engine:
        module = engine.load(path)
        with module.instantiate() as instance:
            yield instance
        module.close()


def test_all_kinds_of_state_survive_the_bake() -> None:
    """Globals of every type, grown tables with nulls and moved functions, grown memory: all answer as after init."""
    guest = initialise_guest(STATEFUL, {}, [])
    with restored(guest.baked_wasm) as instance:
        assert {which: instance.call("gp_token_bytes", which) for which in ANSWERS} == ANSWERS
        with pytest.raises(GuestTrap):
            instance.call("gp_token_bytes", 20)  # the element that init set to null


def test_restored_instances_do_not_share_state() -> None:
    """What one restored instance writes is seen by no other and by no later one."""
    guest = initialise_guest(STATEFUL, {}, [])
    with sealed(compiled(guest.baked_wasm)) as path, GuestEngine() as engine:
        module = engine.load(path)
        with module.instantiate() as first, module.instantiate() as second:
            assert [first.call("gp_token_bytes", 11) for _ in range(3)] == [-4, -3, -2]
            assert second.call("gp_token_bytes", 11) == -4
            first.write(200_000, bytes(8))
            assert second.call("gp_token_bytes", 7) == ANSWERS[7]
        with module.instantiate() as third:
            assert third.call("gp_token_bytes", 7) == ANSWERS[7]
        module.close()


def test_baking_is_deterministic_and_parses_again() -> None:
    """Two initialisations give the same bytes, and the result is a module that the checker accepts."""
    first, second = initialise_guest(STATEFUL, {}, []), initialise_guest(STATEFUL, {}, [])
    assert first.baked_wasm == second.baked_wasm
    module = parse_module(first.baked_wasm)
    assert module.start is None
    assert module.memory is not None
    assert module.memory.minimum == 4


def test_memory_is_mapped_out_of_the_sealed_file_and_not_copied() -> None:
    """The linear memory of a restored guest is a mapping of the memory file, also above 16 MiB."""
    touch_all = """
      (drop (memory.grow (i32.const 512)))
      (memory.fill (i32.const 65536) (i32.const 90) (i32.const 33554432))"""
    guest = initialise_guest(wat_guest(init=touch_all), {}, [])
    with sealed(compiled(guest.baked_wasm)) as path, GuestEngine() as engine:
        module = engine.load(path)
        with module.instantiate() as instance:
            assert instance.read(20 * MEBIBYTE, 4) == b"ZZZZ"
            mapped = [
                line.split()
                for line in Path("/proc/self/maps").read_text().splitlines()
                if "/memfd:guest" in line and " rw-p " in line
            ]
            sizes = [int(end, 16) - int(start, 16) for start, end in (row[0].split("-") for row in mapped)]
            assert max(sizes) >= 32 * MEBIBYTE
        module.close()


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.integers(0, 3 * WASM_PAGE_BYTES - 1), st.binary(min_size=1, max_size=9), max_size=5))
def test_any_memory_content_survives_the_bake(writes: dict[int, bytes]) -> None:
    """Sparse, dense, empty and edge-touching memories are restored byte for byte, whatever the segment's bounds."""
    memory = bytearray(3 * WASM_PAGE_BYTES)
    for position, data in writes.items():
        end = min(position + len(data), len(memory))
        memory[position:end] = data[: end - position]
    module = parse_module(wat_guest(pages=3))
    baked = bake(module, CapturedState(bytes(memory), {}, []))
    with sealed(compile_in_process(baked)) as path, GuestEngine() as engine:  # a process for each would be 0.1 s
        loaded = engine.load(path)
        with loaded.instantiate() as instance:
            assert instance.read(0, len(memory)) == bytes(memory)
        loaded.close()


def test_the_toy_guest_records_its_programs_and_restores() -> None:
    """The example: both programs decode, handles are in the order of asking, init's state is there after restore."""
    guest = toy_guest(vocabulary=321)
    assert guest.tensor_handles == ("embed.weight", "lm_head.weight")
    assert not guest.has_tokenizer
    for kind in (ProgramKind.PREFILL, ProgramKind.DECODE):
        program = decode_program(guest.programs[kind], num_tensors=2)
        assert program.kind is kind
        opcodes = [operation.opcode for operation in program.operations]
        assert opcodes == [Opcode.EMBED, Opcode.LAST_ROWS, Opcode.LINEAR, Opcode.OUTPUT]
        assert program.operations[2].ints[0] == 321
        assert program.operations[3].out == NO_VALUE
    with restored(guest.baked_wasm) as instance:
        assert instance.call("gp_resume", -1) == 0


def test_a_failing_init_says_why() -> None:
    """gp_init's error code and the guest's own words reach the person who builds."""
    with pytest.raises(GuestContractError, match="code 1; the guest logged: asset 'config' must hold"):
        initialise_guest(toy_wasm(), {}, ["embed.weight", "lm_head.weight"])
    with pytest.raises(GuestContractError, match="needs the tensors"):
        initialise_guest(toy_wasm(), {"config": b"\1\0\0\0"}, ["embed.weight"])


def test_asset_reads_are_bounded_by_the_asset() -> None:
    """asset_size and asset_read: a missing asset is -1, reads stop at the end, names are found exactly."""
    wasm = wat_guest(
        '(data (i32.const 0) "ab") (global $seen (mut i64) (i64.const 0))',
        init="""
        (global.set $seen (call $asset_size (i32.const 0) (i32.const 1)))
        (if (i64.ne (call $asset_size (i32.const 0) (i32.const 2)) (i64.const -1)) (then unreachable))
        (if (i32.ne (call $asset_read (i32.const 0) (i32.const 2) (i64.const 0) (i32.const 64) (i32.const 1))
                    (i32.const -1)) (then unreachable))
        (if (i32.ne (call $asset_read (i32.const 0) (i32.const 1) (i64.const 3) (i32.const 64) (i32.const 100))
                    (i32.const 2)) (then unreachable))
        (if (i32.ne (call $asset_read (i32.const 0) (i32.const 1) (i64.const 9) (i32.const 64) (i32.const 1))
                    (i32.const 0)) (then unreachable))""",
        query="(if (i32.eqz (local.get $which)) (then (return (global.get $seen)))) (i64.load (i32.const 64))",
    )
    guest = initialise_guest(wasm, {"a": b"xyzWZ"}, [])
    with restored(guest.baked_wasm) as instance:
        assert instance.call("gp_token_bytes", 0) == 5
        assert instance.call("gp_token_bytes", 1) == int.from_bytes(b"WZ", "little")


INIT_BREAKS: dict[str, tuple[str, type[Exception], str]] = {
    "log pointer out of range": (
        "(call $log (i32.const 1) (i32.const -16) (i32.const 32))",
        GuestContractError,
        "outside its memory",
    ),
    "asset name out of range": (
        "(drop (call $asset_size (i32.const 65530) (i32.const 100)))",
        GuestContractError,
        "outside its memory",
    ),
    "asset name too long": (
        "(drop (call $asset_size (i32.const 0) (i32.const 5000)))",
        GuestContractError,
        "name of 5000 bytes",
    ),
    "program cut short": (
        "(drop (call $program (i32.const 4096) (i32.const 3)))",
        ProgramError,
        "program of 3 bytes",
    ),
    "program of an unknown kind": (
        "(i32.store16 (i32.const 4102) (i32.const 9))",
        ProgramError,
        "unknown program kind 9",
    ),
    "program recorded twice": (
        "(drop (call $program (i32.const 4096) (i32.const 80)))",
        ProgramError,
        "PREFILL program twice",
    ),
    "malformed operation": (
        "(i32.store16 (i32.const 4112) (i32.const 99))",
        ProgramError,
        "unknown opcode 99",
    ),
    "trap": ("(unreachable)", GuestTrap, "unreachable"),
}


@pytest.mark.parametrize(("init", "kind", "reason"), INIT_BREAKS.values(), ids=INIT_BREAKS.keys())
def test_an_init_that_breaks_the_contract_is_a_clean_error(init: str, kind: type[Exception], reason: str) -> None:
    """Pointers, names and programs from a guest are checked; the error names what was wrong."""
    assert len(output_program(ProgramKind.PREFILL)) == 80
    with pytest.raises(kind, match=reason):
        initialise_guest(wat_guest(init=init), {}, [])


def test_a_missing_asset_name_and_tensor_are_answers_not_errors() -> None:
    """tensor gives -1 for an unknown name, and the same handle when asked twice."""
    wasm = wat_guest(
        '(data (i32.const 0) "xy")',
        init="""
        (if (i32.ne (call $tensor (i32.const 0) (i32.const 2)) (i32.const -1)) (then unreachable))
        (if (i32.ne (call $tensor (i32.const 1) (i32.const 1)) (i32.const 0)) (then unreachable))
        (if (i32.ne (call $tensor (i32.const 0) (i32.const 1)) (i32.const 1)) (then unreachable))
        (if (i32.ne (call $tensor (i32.const 1) (i32.const 1)) (i32.const 0)) (then unreachable))
        (call $log (i32.const 2) (i32.const 0) (i32.const 2))""",
    )
    guest = initialise_guest(wasm, {}, ["x", "y", "unused"])
    assert guest.tensor_handles == ("y", "x")
    assert [(line.level, line.text) for line in guest.log] == [(LogLevel.WARNING, "xy")]


def test_code_that_addresses_segments_by_number_is_refused_at_compile() -> None:
    """memory.init of a second data segment has nothing to refer to after the bake, so the compiler refuses it."""
    wasm = wat_guest(
        '(data $second (i32.const 50) "z")',
        query="(memory.init $second (i32.const 0) (i32.const 0) (i32.const 0)) (i64.const 0)",
    )
    guest = initialise_guest(wasm, {}, [])
    with pytest.raises(GuestModuleRefused, match="data segment"):
        compile_guest(guest.baked_wasm)


@pytest.mark.parametrize(
    ("declaration", "reason"),
    [
        ("(func (param externref))", "value type 0x6f"),
        ("(func (result i32) (return_call 0 (i32.const 0) (i32.const 0)))", "tail call"),
        ("(func (drop (i64.add128 (i64.const 0) (i64.const 0) (i64.const 0) (i64.const 0))))", "wide"),
        ("(func (drop (i32.atomic.load (i32.const 0))))", "threads"),
        (
            "(func (result v128) (f32x4.relaxed_min (v128.const i64x2 0 0) (v128.const i64x2 0 0)))",
            "relaxed SIMD",
        ),
    ],
)
def test_proposals_that_are_off_are_refused(declaration: str, reason: str) -> None:
    """Modules that use a proposal guests do not need are refused by the checker or by Wasmtime."""
    with pytest.raises(GuestModuleRefused, match=reason):
        initialise_guest(wat_guest(declaration), {}, [])
