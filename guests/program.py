"""Tensor programs: what a guest records at init and a backend binds to its device.

Binary form, little-endian: a 16-byte header (magic ``GPRG``, u16 version, u16 kind, u32 operations, u32 values),
then 64 bytes an operation: u16 opcode, u16 flags (0), u32 out, u32 in[2], u32 reserved, u32 tensors[3], i32 ints[6],
f32 floats[2].
Values are numbered from 0; tensors are handles, indices into the snapshot's tensor table.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from guests.abi import NO_TENSOR, NO_VALUE, Opcode, ProgramKind
from guests.errors import ProgramError

MAGIC: Final = b"GPRG"
VERSION: Final = 1
MAX_OPERATIONS: Final = 65_536
MAX_VALUES: Final = 65_536
HEADER: Final = struct.Struct("<4sHHII")
OPERATION: Final = struct.Struct("<HHI2II3I6i2f")


@dataclass(frozen=True, slots=True)
class Operation:
    """One record. ``inputs`` and ``tensors`` hold NO_VALUE / NO_TENSOR where unused."""

    opcode: Opcode
    out: int
    inputs: tuple[int, int]
    tensors: tuple[int, int, int]
    ints: tuple[int, int, int, int, int, int]
    floats: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Program:
    """A straight-line tensor program, shape-polymorphic in tokens and sequences."""

    kind: ProgramKind
    num_values: int
    operations: tuple[Operation, ...]


def decode_program(data: bytes, *, num_tensors: int) -> Program:
    """Parse and check a program.

    Every operand index is checked: values below ``num_values`` and defined before use, tensors below
    ``num_tensors``, the last operation (and no other) is OUTPUT.

    Raises:
        ProgramError: anything is out of range; the message names the operation's index.
    """
    if len(data) < HEADER.size:
        raise ProgramError(f"program of {len(data)} bytes is shorter than its {HEADER.size}-byte header")
    magic, version, kind, num_operations, num_values = HEADER.unpack_from(data)
    if magic != MAGIC or version != VERSION:
        raise ProgramError(f"program header {magic!r} version {version}: expected {MAGIC!r} version {VERSION}")
    if num_operations > MAX_OPERATIONS or num_values > MAX_VALUES:
        raise ProgramError(
            f"{num_operations} operations, {num_values} values: at most {MAX_OPERATIONS} and {MAX_VALUES}"
        )
    if len(data) != HEADER.size + num_operations * OPERATION.size:
        raise ProgramError(f"program of {len(data)} bytes does not hold {num_operations} operations")
    try:
        program_kind = ProgramKind(kind)
    except ValueError as error:
        raise ProgramError(f"unknown program kind {kind}") from error
    operations = tuple(_decode_operation(data, HEADER.size + i * OPERATION.size, i) for i in range(num_operations))
    program = Program(program_kind, num_values, operations)
    validate_program(program, num_tensors=num_tensors)
    return program


def _decode_operation(data: bytes, offset: int, index: int) -> Operation:
    fields = OPERATION.unpack_from(data, offset)
    try:
        opcode = Opcode(fields[0])
    except ValueError as error:
        raise ProgramError(f"operation {index}: unknown opcode {fields[0]}") from error
    if fields[1] != 0 or fields[5] != 0:
        raise ProgramError(f"operation {index}: flags and reserved field must be 0")
    return Operation(
        opcode,
        fields[2],
        (fields[3], fields[4]),
        (fields[6], fields[7], fields[8]),
        tuple(fields[9:15]),
        (fields[15], fields[16]),
    )


def validate_program(program: Program, *, num_tensors: int) -> None:
    """Check operand ranges and definition before use.

    Raises:
        ProgramError: see :func:`decode_program`.
    """
    defined: set[int] = set()
    for index, operation in enumerate(program.operations):
        is_last = index == len(program.operations) - 1
        if (operation.opcode is Opcode.OUTPUT) != is_last:
            raise ProgramError(f"operation {index}: OUTPUT must be the last operation, and only the last")
        for value in operation.inputs:
            if value != NO_VALUE and value not in defined:
                raise ProgramError(f"operation {index}: value {value} is used before it is defined")
        for tensor in operation.tensors:
            if tensor != NO_TENSOR and tensor >= num_tensors:
                raise ProgramError(f"operation {index}: tensor {tensor}: the table has {num_tensors}")
        if operation.out != NO_VALUE:
            if operation.out >= program.num_values:
                raise ProgramError(f"operation {index}: value {operation.out} of {program.num_values}")
            defined.add(operation.out)
    if not program.operations:
        raise ProgramError("a program needs at least its OUTPUT operation")


def encode_program(program: Program) -> bytes:
    """The binary form of ``program``; inverse of :func:`decode_program`."""
    parts = [HEADER.pack(MAGIC, VERSION, program.kind, len(program.operations), program.num_values)]
    parts += [
        OPERATION.pack(op.opcode, 0, op.out, *op.inputs, 0, *op.tensors, *op.ints, *op.floats)
        for op in program.operations
    ]
    return b"".join(parts)
