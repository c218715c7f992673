"""Guests for tests: compiled from C or WAT, initialised, compiled and sealed the way a worker gets them."""

from __future__ import annotations

import fcntl
import functools
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import wasmtime

from guests.abi import NO_TENSOR, NO_VALUE, Opcode, ProgramKind
from guests.build import compile_c
from guests.compile import compile_guest
from guests.initialise import InitialisedGuest, initialise_guest
from guests.program import Operation, Program, encode_program
from guests.shipped import toy_wasm

SOURCES = Path(__file__).parent / "guest_sources"
PROGRAM_AT = 4096  # where wat_guest puts the programs that its gp_init records


@functools.cache
def bytes_guest() -> InitialisedGuest:
    """The misbehaving byte tokeniser of ``guest_sources/bytes_guest.c`` after its init."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "bytes_guest.wasm"
        compile_c([str(SOURCES / "bytes_guest.c")], output)
        return initialise_guest(output.read_bytes(), {}, [])


@functools.cache
def compiled(baked_wasm: bytes) -> bytes:
    """compile_guest, once for each module: every compilation takes a process of its own."""
    return compile_guest(baked_wasm)


@functools.cache
def toy_guest(vocabulary: int = 100) -> InitialisedGuest:
    """The example guest after its init."""
    config = {"config": struct.pack("<I", vocabulary)}
    return initialise_guest(toy_wasm(), config, ["embed.weight", "lm_head.weight"])


def output_program(kind: ProgramKind) -> bytes:
    """The shortest valid program."""
    nothing = (NO_TENSOR, NO_TENSOR, NO_TENSOR)
    output = Operation(Opcode.OUTPUT, NO_VALUE, (NO_VALUE, NO_VALUE), nothing, (0, 0, 0, 0, 0, 0), (0.0, 0.0))
    return encode_program(Program(kind, 0, (output,)))


def wat_guest(
    declarations: str = "", *, init: str = "", query: str = "(i64.const 0)", pages: int = 1, imports: str = ""
) -> bytes:
    """A guest in WebAssembly text that records both programs at init. ``init`` runs there first, and ``query`` is
    the body of gp_token_bytes(``$which`` i32) -> i64, which the tests read state through."""
    programs = [output_program(kind) for kind in ProgramKind]
    size = len(programs[0])
    data = "".join(f"\\{byte:02x}" for byte in b"".join(programs))
    text = f"""(module
      (import "glowplug" "program" (func $program (param i32 i32) (result i32)))
      (import "glowplug" "log" (func $log (param i32 i32 i32)))
      (import "glowplug" "asset_size" (func $asset_size (param i32 i32) (result i64)))
      (import "glowplug" "asset_read" (func $asset_read (param i32 i32 i64 i32 i32) (result i32)))
      (import "glowplug" "tensor" (func $tensor (param i32 i32) (result i32)))
      {imports}
      (memory (export "memory") {pages})
      (data (i32.const {PROGRAM_AT}) "{data}")
      {declarations}
      (func (export "gp_abi") (result i32) (i32.const 1))
      (func (export "gp_init") (result i32)
        {init}
        (i32.or (call $program (i32.const {PROGRAM_AT}) (i32.const {size}))
                (call $program (i32.const {PROGRAM_AT + size}) (i32.const {size}))))
      (func (export "gp_resume") (param i64) (result i32) (i32.const 0))
      (func (export "gp_token_bytes") (param $which i32) (result i64) {query})
      (func (export "gp_buffer") (param i32) (result i32) (i32.const 0))
      (func (export "gp_tokenize") (param i32 i32 i32) (result i64) (i64.const -1))
      (func (export "gp_detokenize") (param i32 i32 i32) (result i64) (i64.const -1))
      (func (export "gp_sequence_open") (param i32 i32 i32) (result i32) (i32.const -1))
      (func (export "gp_sequence_push") (param i32 i32) (result i64) (i64.const -1))
      (func (export "gp_sequence_flush") (param i32) (result i64) (i64.const -1))
      (func (export "gp_sequence_close") (param i32)))"""
    return bytes(wasmtime.wat2wasm(text))


@contextmanager
def sealed(code: bytes) -> Iterator[str]:
    """``/proc/self/fd/N`` of a sealed memory file that holds ``code``."""
    fd = os.memfd_create("guest", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(code)
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)
