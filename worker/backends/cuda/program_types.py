"""What a tensor program's values are on the device: element types, buffers, last uses. Decided once, when it is bound.

The residual stream and the logits are float32; what feeds and leaves matrix products has the activation type.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final

from guests.abi import NO_VALUE, Opcode
from guests.program import Operation, Program
from worker.backends.cuda.device import ACTIVATION_BYTES
from worker.backends.cuda_kernels import Activation
from worker.backends.program_shapes import Rows, ValueShape
from worker.backends.protocol import BackendError

#: Operations of decoders; an encoder's have no kernels here.
SUPPORTED: Final = frozenset(
    {
        *(Opcode.EMBED, Opcode.RMS_NORM, Opcode.LINEAR, Opcode.HEAD_RMS_NORM, Opcode.ROPE, Opcode.KV_APPEND),
        *(Opcode.ATTENTION, Opcode.SILU_MUL, Opcode.ADD, Opcode.LAST_ROWS, Opcode.OUTPUT),
    }
)
_IN_PLACE: Final = (Opcode.HEAD_RMS_NORM, Opcode.ROPE)


@dataclass(slots=True)
class ValueTypes:
    """By value number. ``buffers[v]`` names a buffer of ``row_bytes`` in the pool of the value's rows."""

    types: dict[int, Activation] = field(default_factory=dict)
    buffers: dict[int, int] = field(default_factory=dict)
    row_bytes: dict[Rows, list[int]] = field(default_factory=lambda: {rows: [] for rows in Rows})
    last_use: dict[int, int] = field(default_factory=dict)  # index of the operation
    num_uses: dict[int, int] = field(default_factory=dict)


def rename_values(program: Program) -> Program:
    """``program`` with a number of its own for every result. A guest's program may store a later result under the
    number of an earlier one; types and buffers are kept by number here."""
    names: dict[int, int] = {NO_VALUE: NO_VALUE}
    renamed: list[Operation] = []
    num_values = 0
    for operation in program.operations:
        first, second = (names[value] for value in operation.inputs)
        if operation.out != NO_VALUE and not (operation.opcode in _IN_PLACE and operation.out == operation.inputs[0]):
            names[operation.out] = num_values
            num_values += 1
        renamed.append(replace(operation, inputs=(first, second), out=names[operation.out]))
    return replace(program, num_values=num_values, operations=tuple(renamed))


def assign_values(program: Program, shapes: dict[int, ValueShape], activation: Activation) -> ValueTypes:
    """Types and buffers of every value of ``program``.

    Raises:
        BackendError: an operation without a kernel here.
    """
    values = ValueTypes()
    for index, operation in enumerate(program.operations):
        if operation.opcode not in SUPPORTED:
            raise BackendError(f"operation {index} ({operation.opcode.name}): the GPU backend has no kernel for it")
        for value in operation.inputs:
            if value != NO_VALUE:
                values.last_use[value] = index
                values.num_uses[value] = values.num_uses.get(value, 0) + 1
    results = {operation.inputs[0] for operation in program.operations if operation.opcode is Opcode.OUTPUT}
    free: dict[Rows, list[int]] = {rows: [] for rows in Rows}
    for index, operation in enumerate(program.operations):
        if operation.out != NO_VALUE and operation.opcode not in _IN_PLACE:
            out = operation.out
            values.types[out] = _type_of(operation, values.types, activation, out in results)
            if not _shares_residual(operation, values, index):
                needed = shapes[out].width * ACTIVATION_BYTES[values.types[out]]
                values.buffers[out] = _take_buffer(values.row_bytes[shapes[out].rows], free[shapes[out].rows], needed)
        for value in {value for value in operation.inputs if value != NO_VALUE}:
            shared = operation.out != value and values.buffers[value] == values.buffers.get(operation.out, -1)
            same_rows = operation.out in shapes and shapes[operation.out].rows is shapes[value].rows
            if values.last_use[value] == index and not (shared and same_rows) and operation.out != value:
                free[shapes[value].rows].append(values.buffers[value])
    return values


def _type_of(operation: Operation, types: dict[int, Activation], activation: Activation, is_result: bool) -> Activation:
    if operation.opcode in (Opcode.EMBED, Opcode.ADD):
        return "f32"
    if operation.opcode is Opcode.LAST_ROWS:
        return types[operation.inputs[0]]
    if operation.opcode is Opcode.LINEAR and is_result:
        return "f32"
    return activation


def _shares_residual(operation: Operation, values: ValueTypes, index: int) -> bool:
    """ADD goes on in its first operand's buffer where nobody needs that operand any more."""
    first = operation.inputs[0]
    if operation.opcode is not Opcode.ADD or values.types[first] != "f32" or values.last_use[first] != index:
        return False
    values.buffers[operation.out] = values.buffers[first]
    return True


def _take_buffer(row_bytes: list[int], free: list[int], needed: int) -> int:
    """A free buffer, the smallest that is large enough, else the largest made larger, else a new one."""
    if not free:
        row_bytes.append(needed)
        return len(row_bytes) - 1
    fitting = [buffer for buffer in free if row_bytes[buffer] >= needed]
    chosen = min(fitting, key=row_bytes.__getitem__) if fitting else max(free, key=row_bytes.__getitem__)
    row_bytes[chosen] = max(row_bytes[chosen], needed)
    free.remove(chosen)
    return chosen
