"""A byte tokeniser in WebAssembly text of which one export can be replaced by an attack, sprung by the input."""

from __future__ import annotations

import wasmtime

from guests.runtime import InstanceLimits

LIMITS = InstanceLimits(memory_bytes=4 << 20, table_elements=100, call_deadline_ms=40, result_bytes=64 << 10)

IMPORTS = """
  (import "glowplug" "log" (func $log (param i32 i32 i32)))
  (import "glowplug" "tensor" (func $tensor (param i32 i32) (result i32)))
"""

# Buffers: input at 4096, ids at 16384, text at 32768, push result at 1024. Sequences count their pushes at 2048.
DECLARATIONS = """
  (memory (export "memory") 1)
  (table $table 2 funcref) (elem (table $table) (i32.const 0) func $wrong_type)
  (type $answer (func (result i64)))
  (func $wrong_type (param i32))
  (global $depth (mut i32) (i32.const 0))
  (func $recurse (param i32) (result i32) (i32.add (i32.const 1) (call $recurse (i32.add (local.get 0) (i32.const 1)))))
  (func $bytes_to_ids (param $at i32) (param $length i32) (result i64) (local $i i32)
    (block $done (loop $next
      (br_if $done (i32.ge_u (local.get $i) (local.get $length)))
      (i32.store (i32.add (i32.const 16384) (i32.shl (local.get $i) (i32.const 2)))
                 (i32.load8_u (i32.add (local.get $at) (local.get $i))))
      (local.set $i (i32.add (local.get $i) (i32.const 1))) (br $next)))
    (call $pack (i32.const 16384) (local.get $length)))
  (func $ids_to_bytes (param $at i32) (param $count i32) (result i64) (local $i i32)
    (block $done (loop $next
      (br_if $done (i32.ge_u (local.get $i) (local.get $count)))
      (i32.store8 (i32.add (i32.const 32768) (local.get $i))
                  (i32.load (i32.add (local.get $at) (i32.shl (local.get $i) (i32.const 2)))))
      (local.set $i (i32.add (local.get $i) (i32.const 1))) (br $next)))
    (call $pack (i32.const 32768) (local.get $count)))
  (func $pack (param i32 i32) (result i64)
    (i64.or (i64.shl (i64.extend_i32_u (local.get 0)) (i64.const 32)) (i64.extend_i32_u (local.get 1))))
"""

#: Each export with its type, when the attack springs, and what it does otherwise.
EXPORTS: dict[str, tuple[str, str, str]] = {
    "gp_abi": ("(result i32)", "(i32.const 0)", "(i32.const 1)"),
    "gp_init": ("(result i32)", "(i32.const 0)", "(i32.const 0)"),
    "gp_resume": ("(param i64) (result i32)", "(i64.eq (local.get 0) (i64.const 33))", "(i32.const 0)"),
    "gp_buffer": ("(param i32) (result i32)", "(i32.eq (local.get 0) (i32.const 33))", "(i32.const 4096)"),
    "gp_tokenize": (
        "(param i32 i32 i32) (result i64)",
        "(i32.eq (i32.load8_u (local.get 0)) (i32.const 33))",
        "(call $bytes_to_ids (local.get 0) (local.get 1))",
    ),
    "gp_detokenize": (
        "(param i32 i32 i32) (result i64)",
        "(i32.eq (i32.load (local.get 0)) (i32.const 33))",
        "(call $ids_to_bytes (local.get 0) (local.get 1))",
    ),
    "gp_token_bytes": (
        "(param i32) (result i64)",
        "(i32.eq (local.get 0) (i32.const 33))",
        "(i32.store8 (i32.const 32768) (local.get 0)) (call $pack (i32.const 32768) (i32.const 1))",
    ),
    "gp_sequence_open": (
        "(param i32 i32 i32) (result i32)",
        "(i32.eq (i32.load8_u (i32.const 4104)) (i32.const 33))",
        "(i32.store8 (i32.const 4104) (i32.const 0)) (i32.const 0)",
    ),
    "gp_sequence_push": (
        "(param i32 i32) (result i64)",
        "(i32.eq (local.get 1) (i32.const 33))",
        """(i32.store (i32.const 32768) (local.get 1))
           (i32.store (i32.const 1024) (i32.const 32768)) (i32.store (i32.const 1028) (i32.const 1))
           (i32.store (i32.const 1032) (i32.const 0)) (call $pack (i32.const 1024) (i32.const 12))""",
    ),
    "gp_sequence_flush": (
        "(param i32) (result i64)",
        "(i32.eq (i32.load8_u (i32.const 32768)) (i32.const 34))",
        "(call $pack (i32.const 32768) (i32.const 0))",
    ),
    "gp_sequence_close": ("(param i32)", "(i32.eq (i32.load8_u (i32.const 32768)) (i32.const 34))", "(nop)"),
}


#: Attacks that fit every export, as they never return: code, and what the error says.
TRAPS: dict[str, tuple[str, str]] = {
    "unreachable": ("(unreachable)", "unreachable"),
    "endless loop": ("(loop $l (br $l)) (unreachable)", "deadline of 40 ms"),
    "endless recursion": ("(drop (call $recurse (i32.const 0))) (unreachable)", "call stack exhausted"),
    "shadow stack overflow": (
        "(i32.store (i32.sub (i32.const 0) (i32.const 16)) (i32.const 1)) (unreachable)",
        "out of",
    ),
    "division by zero": ("(drop (i32.div_u (i32.const 1) (i32.const 0))) (unreachable)", "divide by zero"),
    "null function": ("(drop (call_indirect (type $answer) (i32.const 1))) (unreachable)", "uninitialized element"),
    "function of another type": (
        "(drop (call_indirect (type $answer) (i32.const 0))) (unreachable)",
        "indirect call type mismatch",
    ),
    "forbidden host call": (
        "(drop (call $tensor (i32.const 0) (i32.const 1))) (unreachable)",
        "tensor is available only while gp_init runs",
    ),
    "log out of range": ("(call $log (i32.const 0) (i32.const -8) (i32.const 64)) (unreachable)", "outside its memory"),
    "log of no level": ("(call $log (i32.const 9) (i32.const 0) (i32.const 1)) (unreachable)", "log level 9"),
    "log flood": (
        "(loop $l (call $log (i32.const 0) (i32.const 0) (i32.const 64)) (br $l)) (unreachable)",
        "deadline of 40 ms",
    ),
    "memory bomb": (
        """(loop $l (br_if $l (i32.ne (memory.grow (i32.const 1)) (i32.const -1))))
           (memory.fill (i32.const 65536) (i32.const 255) (i32.sub (i32.mul (memory.size) (i32.const 65536))
                        (i32.const 65536)))
           (drop (i32.load (i32.mul (memory.size) (i32.const 65536)))) (unreachable)""",
        "out of bounds memory access",
    ),
    "table bomb": (
        """(loop $l (br_if $l (i32.ne (table.grow $table (ref.null func) (i32.const 1)) (i32.const -1))))
           (table.set $table (table.size $table) (ref.null func)) (unreachable)""",
        "out of bounds table access",
    ),
    "one huge memory.grow": (
        "(drop (i32.load (i32.mul (memory.grow (i32.const 65535)) (i32.const 65536)))) (unreachable)",
        "out of bounds memory access",
    ),
}

#: Packed results that lie: pointer << 32 | length.
LIES: dict[str, str] = {
    "pointer out of range": "0x7fffff00_00000010",
    "pointer at the last byte": "0x0000ffff_00000010",
    "pointer and length overflow": "0xfffffff0_00000020",
    "length of 4 GiB": "0x00001000_ffffffff",
    "length of 2 GiB": "0x00000000_80000000",
    "length beyond the memory": "0x00001000_00010000",
    "negative": "0xffffffff_fffffffe",
    "failure": "0xffffffff_ffffffff",
}


def hostile_guest(export: str = "", attack: str = "(unreachable)", *, declarations: str = "") -> bytes:
    """The tokeniser; ``export`` runs ``attack`` (whose value, if any, it returns) when its input springs it: the
    first byte, id or token is 33 ("!"), the input is 33 bytes long, or the sequence was last given token 34."""
    functions = []
    for name, (signature, springs, body) in EXPORTS.items():
        result = signature[signature.find("(result") :] if "(result" in signature else ""
        if name == export:
            body = f"(if {result} {springs} (then {attack}) (else {body}))"
        functions.append(f'(func (export "{name}") {signature} {body})')
    text = f"(module {IMPORTS} {DECLARATIONS} {declarations} {' '.join(functions)})"
    return bytes(wasmtime.wat2wasm(text))
