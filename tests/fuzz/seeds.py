"""Good inputs for each parser, small ones: where a fuzzer starts, and what property tests mutate."""

from __future__ import annotations

import struct
from functools import cache
from typing import Final

import zstandard

from guests.abi import NO_TENSOR, NO_VALUE, Opcode, ProgramKind
from guests.program import Operation, Program, encode_program
from snapshots import manifest, transport_format, weights_file
from tests.checkpoint_files import write_tiny_gguf
from tests.fuzz.parser_targets import GUEST_WASM, sample, scratch
from tests.snapshot_fixtures import SPECS, make_key

#: Headers that promise more than there is: counts, lengths and nesting at the limits of their fields.
LARGEST: Final = (0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFF_FFFF, 0xFFFF_FFFF, (1 << 63) - 1, (1 << 64) - 1)


@cache
def good_inputs() -> dict[str, list[bytes]]:
    """At least one input for each target that its parser accepts."""
    transport_file, (container, _), _ = sample()
    encrypted_file, encrypted_header, _ = sample(encrypted=True)
    body_bytes = manifest.HEADER.unpack_from(container)[3]
    header = weights_file.plan_weights(SPECS[1:2]).header
    tensor = b'{"w":{"dtype":"F32","shape":[4,2],"data_offsets":[0,32]}}'
    tensor += b" " * (-len(tensor) % 8)
    gguf_path = scratch() / "tiny.gguf"
    write_tiny_gguf(gguf_path)
    key = make_key()
    return {
        "container": [container],
        "signed_body": [container[manifest.HEADER.size : manifest.HEADER.size + body_bytes]],
        "transport_header": [transport_file[: 40 + len(container)], encrypted_file[: encrypted_header.frame_bytes]],
        "transport_frames": [b"", b"\0\0\0\0", b"\0\0\0\1" + transport_file[24 + len(container) :]],
        "encrypted_transport_frames": [b"\0\0\0\1" + encrypted_file[encrypted_header.frame_bytes :]],
        "encrypted_chunk": [zstandard.ZstdCompressor().compress(GUEST_WASM)],
        "whole_import": [transport_file, encrypted_file],
        "weights_header": [b'{"w":{"dtype":"U8","shape":[4096],"data_offsets":[0,4096]}}', header[8:]],
        "safetensors_checkpoint": [struct.pack("<Q", len(tensor)) + tensor + bytes(32)],
        "gguf": [gguf_path.read_bytes()],
        "keys": [f"{key.key_id} {key.secret.hex()} {key.created} active".encode(), b"a:" + b"5a" * 32],
        "rollback_record": [b"tiny 1790000000.5 3d1e054cbbf3f751\n"],
        "tensor_program": [_program()],
        "wasm_module": [_wasm_module()],
    }


@cache
def greedy_inputs() -> dict[str, list[bytes]]:
    """Small inputs that claim to be large, or cost much to believe."""
    claims: dict[str, list[bytes]] = {name: [] for name in good_inputs()}
    for number in LARGEST:
        entry = b'{"w":{"dtype":"F32","shape":[%d,%d],"data_offsets":[0,%d]}}' % ((number,) * 3)
        eight, four = (number & (1 << 64) - 1).to_bytes(8, "little"), (number & 0xFFFF_FFFF).to_bytes(4, "little")
        claims["container"].append(manifest.MAGIC + b"\1\0\6\0" + four + bytes(64))
        frame = struct.pack("<I", transport_format.SKIPPABLE_MAGIC) + four
        claims["transport_header"].append(frame + transport_format.MAGIC + b"\1\0\0\0" + four + bytes(99))
        claims["safetensors_checkpoint"] += [
            eight + b"{}",
            _framed(entry),
        ]
        claims["weights_header"].append(entry)
        claims["gguf"] += [
            b"GGUF\3\0\0\0" + eight + bytes(8),
            b"GGUF\3\0\0\0" + bytes(8) + eight,
            b"GGUF\3\0\0\0" + bytes(8) + b"\1" + bytes(7) + eight + b"key",
            b"GGUF\3\0\0\0" + bytes(8) + b"\1" + bytes(7) + b"\1" + bytes(7) + b"k\x09\0\0\0\x08\0\0\0" + eight,
        ]
        claims["wasm_module"].append(b"\0asm\1\0\0\0\1" + _leb128(number & 0xFFFF_FFFF) + bytes(8))
        claims["tensor_program"].append(b"GPRG" + four * 4)
    many = ",".join(["9223372036854775807"] * 50_000).encode()
    many_sizes = b'{"w":{"dtype":"F32","shape":[' + many + b'],"data_offsets":[0,4]}}'
    claims["safetensors_checkpoint"].append(_framed(many_sizes))
    claims["weights_header"].append(many_sizes)
    deep = b'{"a":' * 50_000
    for name in ("weights_header", "signed_body"):
        claims[name].append(deep)
    claims["signed_body"].append(b"[" * 100_000)
    claims["safetensors_checkpoint"].append(_framed(deep))
    return claims


def _framed(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + bytes(64)


def _leb128(number: int) -> bytes:
    out = bytearray()
    while True:
        number, low = number >> 7, number & 0x7F
        out.append(low | (0x80 if number else 0))
        if not number:
            return bytes(out)


def _program() -> bytes:
    """Two operations: look up rows of tensor 0, and give them out."""
    unused, none = (NO_VALUE, NO_VALUE), (NO_TENSOR, NO_TENSOR, NO_TENSOR)
    lookup = Operation(Opcode.EMBED, 0, unused, (0, *none[1:]), (0,) * 6, (0.0, 0.0))
    output = Operation(Opcode.OUTPUT, NO_VALUE, (0, NO_VALUE), none, (0,) * 6, (0.0, 0.0))
    return encode_program(Program(ProgramKind.DECODE, 1, (lookup, output)))


def _wasm_module() -> bytes:
    """``(module (memory (export "memory") 1) (func (export "f") (result i32) i32.const 7))``, assembled by hand."""
    sections = (
        (1, b"\1\x60\0\1\x7f"),
        (3, b"\1\0"),
        (5, b"\1\0\1"),
        (7, b"\2\6memory\2\0\1f\0\0"),
        (10, b"\1\4\0\x41\7\x0b"),
    )
    return b"\0asm\1\0\0\0" + b"".join(bytes([number, len(data)]) + data for number, data in sections)
