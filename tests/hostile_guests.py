"""A byte tokeniser in WebAssembly text of which one export can be replaced by an attack, sprung by the input."""

from __future__ import annotations

import wasmtime

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
