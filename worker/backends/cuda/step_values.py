"""A step's commands and the places of its values: what the emitters of operations share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from guests.abi import Opcode
from guests.program import Operation
from worker.backends import cuda_kernels as kernels
from worker.backends.cuda.device import ACTIVATION_BYTES, MatrixProduct, Place
from worker.backends.cuda.program_types import ValueTypes
from worker.backends.cuda.step_layout import StepPlaces, StepShape
from worker.backends.cuda.weight_image import ImageTensor, WeightImage
from worker.backends.cuda_kernels import Activation, Launch
from worker.backends.program_shapes import Rows, ValueShape
from worker.backends.protocol import BackendError


@dataclass(frozen=True, slots=True)
class DeviceCopy:
    """Bytes from one place of the device to another."""

    target: Place
    source: Place


@dataclass(frozen=True, slots=True)
class Command:
    """One thing to queue, once the pieces of weights up to ``last_piece`` are there (-1: it reads none)."""

    work: Launch | MatrixProduct | DeviceCopy
    last_piece: int = -1


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Where a step's numbers, the weights and the KV pool are, and where to get scratch memory by name and bytes."""

    step: StepPlaces
    image: Place
    pool: Place
    take: Callable[[str, int], Place]


@dataclass(frozen=True, slots=True)
class BoundProgram:
    """What is decided when a program is bound."""

    operations: tuple[Operation, ...]
    shapes: dict[int, ValueShape]
    values: ValueTypes
    image: WeightImage
    activation: Activation
    num_layers: int
    num_processors: int

    def tensor(self, operation: Operation, position: int = 0) -> ImageTensor:
        """The weight behind an operation's handle."""
        found = self.image.tensors[operation.tensors[position]]
        if found is None:
            raise BackendError(f"operation {operation.opcode.name}: a weight that was not laid out")
        return found


class StepValues:
    """Places of one step's values, each exactly as long as the value is."""

    def __init__(self, program: BoundProgram, shape: StepShape, memory: StepMemory) -> None:
        self.program = program
        self.shape = shape
        self.memory = memory
        self.activation: Activation = program.activation

    def rows_of(self, operation: Operation) -> Rows:
        """Whose rows an operation works on."""
        if operation.opcode is Opcode.EMBED:
            return Rows.TOKENS
        return self.program.shapes[operation.inputs[0]].rows

    def num_rows_of(self, value: int) -> int:
        """Rows of a value in this step."""
        is_token = self.program.shapes[value].rows is Rows.TOKENS
        return self.shape.num_tokens if is_token else self.shape.num_rows

    def width_of(self, value: int) -> int:
        """Columns of a value."""
        return self.program.shapes[value].width

    def place_of(self, value: int) -> Place:
        """Where a value is."""
        rows = self.program.shapes[value].rows
        row_bytes = self.width_of(value) * ACTIVATION_BYTES[self.program.values.types[value]]
        name = f"{rows.value}-{self.program.values.buffers[value]}"
        return self.memory.take(name, row_bytes * self.num_rows_of(value))

    def as_type(self, value: int, wanted: Activation) -> Iterator[Command]:
        """Commands that make ``value`` available as ``wanted`` in :meth:`converted`."""
        if self.program.values.types[value] == wanted:
            return
        count = self.width_of(value) * self.num_rows_of(value)
        convert = kernels.widen if wanted == "f32" else kernels.narrow
        yield Command(convert(self.activation, self.converted(value, wanted), self.place_of(value), count=count))

    def converted(self, value: int, wanted: Activation) -> Place:
        """Where :meth:`as_type` has put it."""
        if self.program.values.types[value] == wanted:
            return self.place_of(value)
        return self.memory.take("converted", ACTIVATION_BYTES[wanted] * self.width_of(value) * self.num_rows_of(value))

    def weight(self, tensor: ImageTensor) -> Place:
        """Where a weight is."""
        return tensor.place_in(self.memory.image)

    def heads_of(self, value: int) -> Place:
        """A value that a kernel changes in place, or reads heads of: it must have the activation type."""
        if self.program.values.types[value] != self.activation:
            raise BackendError("heads are taken of a value that is no result of a matrix product")
        return self.place_of(value)
