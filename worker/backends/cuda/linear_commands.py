"""LINEAR on the device: own kernels for few rows, the vendor's matrix product for many, widened where quantised."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from guests.abi import NO_TENSOR, Opcode
from guests.program import Operation
from worker.backends import cuda_kernels as kernels
from worker.backends.cuda.device import ACTIVATION_BYTES, MatrixProduct, Place
from worker.backends.cuda.step_values import Command, StepValues
from worker.backends.cuda.weight_image import TABLE_TYPES, ImageTensor
from worker.backends.cuda_kernels import FORMATS, OUTPUT_MODES

#: Up to so many rows the own kernels read weights as they are stored; beyond, the vendor's matrix product. They read
#: them once for every four rows; before quantised ones are widened, they may be read twice.
GEMV_MAX_ROWS: Final = {False: 4, True: 8}  # by: quantised
#: Quantised weights are widened for a matrix product in pieces of so many bytes.
WIDENED_BYTES: Final = 64 * 1024 * 1024


class LinearCommands:
    """One step's matrix products."""

    def __init__(self, values: StepValues) -> None:
        self._values = values
        self._program = values.program
        self.fused: set[int] = set()  # ADDs that a LINEAR has done, by index of the operation

    def linear(self, index: int, operation: Operation) -> Iterator[Command]:
        """The commands of operation ``index``."""
        source, weight = operation.inputs[0], self._program.tensor(operation)
        bias = self._program.tensor(operation, 1) if operation.tensors[1] != NO_TENSOR else None
        yield from self._values.as_type(source, self._values.activation)
        out, mode = self._target(index, operation, bias)
        x, num_rows = self._values.converted(source, self._values.activation), self._values.num_rows_of(source)
        if num_rows > GEMV_MAX_ROWS[FORMATS[weight.format].is_quantised]:
            yield from self._multiply(weight, x, out, num_rows, mode)
            if bias is not None:
                kind = self._program.values.types[operation.out]
                places = (out, self._values.weight(bias))
                sizes = {"num_rows": num_rows, "width": weight.shape[0]}
                launch = kernels.bias_add(kind, *places, bias_type=TABLE_TYPES[bias.format], **sizes)
                yield Command(launch, bias.last_piece)
            return
        launch = kernels.gemv(
            weight.format,
            self._values.activation,
            out,
            x,
            self._values.weight(weight),
            weight.scales_in(self._values.memory.image),
            0 if bias is None else self._values.weight(bias),
            bias_type=0 if bias is None else TABLE_TYPES[bias.format],
            num_rows=num_rows,
            num_outputs=weight.shape[0],
            width=weight.shape[1],
            group_size=weight.group_size,
            mode=OUTPUT_MODES[mode],
        )
        yield Command(launch, max(weight.last_piece, -1 if bias is None else bias.last_piece))

    def _target(self, index: int, operation: Operation, bias: ImageTensor | None) -> tuple[Place, str]:
        """Where the product goes and how; notes the ADD that it makes needless."""
        operations, values = self._program.operations, self._program.values
        follower = operations[index + 1]
        if (
            bias is None
            and follower.opcode is Opcode.ADD
            and follower.inputs[1] == operation.out != follower.inputs[0]
            and values.num_uses[operation.out] == 1
            and values.buffers[follower.inputs[0]] == values.buffers[follower.out]
        ):
            self.fused.add(index + 1)
            return self._values.place_of(follower.out), "add"
        is_float32 = values.types[operation.out] == "f32" and self._values.activation != "f32"
        return self._values.place_of(operation.out), "float32" if is_float32 else "activation"

    def _multiply(self, weight: ImageTensor, x: Place, out: Place, num_rows: int, mode: str) -> Iterator[Command]:
        num_outputs, width = weight.shape
        item_bytes, activation = ACTIVATION_BYTES[self._values.activation], self._values.activation
        out_is_float32 = mode != "activation" or activation == "f32"
        out_bytes = 4 if out_is_float32 else item_bytes
        is_plain = not FORMATS[weight.format].is_quantised
        piece_rows = num_outputs if is_plain else max(1, WIDENED_BYTES // (width * item_bytes))
        matrix, scales = self._values.weight(weight), weight.scales_in(self._values.memory.image)
        for first in range(0, num_outputs, piece_rows):
            count = min(piece_rows, num_outputs - first)
            stored = matrix.part(matrix.num_bytes // num_outputs * first, matrix.num_bytes // num_outputs * count)
            if not is_plain:
                wide = self._values.memory.take("widened", count * width * item_bytes)
                row_bytes = weight.scale_row_bytes
                part = scales.part(row_bytes * first, row_bytes * count) if isinstance(scales, Place) else scales
                sizes = {"num_rows": count, "num_table_rows": count, "width": width, "group_size": weight.group_size}
                gather = kernels.gather_rows(weight.format, activation, wide, stored, part, 0, **sizes)
                yield Command(gather, weight.last_piece)
                stored = wide
            spanned = ((num_rows - 1) * num_outputs + count) * out_bytes
            product = MatrixProduct(
                activation,
                out.part(first * out_bytes, spanned),
                x,
                stored,
                num_rows=num_rows,
                num_outputs=count,
                width=width,
                out_stride=num_outputs,
                out_is_float32=out_is_float32,
                adds=mode == "add",
            )
            yield Command(product, weight.last_piece)
