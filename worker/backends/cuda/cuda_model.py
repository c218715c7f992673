"""A model on a GPU: steps are queued, weights may still be arriving, decode steps replay graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import structlog

from guests.abi import Opcode, ProgramKind
from worker.backends.cuda.cuda_program import CudaProgram
from worker.backends.cuda.device import ByteArray, CaptureRefused, Device, Event, Graph, MatrixProduct, Place
from worker.backends.cuda.device_sampling import DeviceSampler
from worker.backends.cuda.kv_pool import KvPool
from worker.backends.cuda.step_layout import StepShape, check_inputs, choose_shape, fill_step, place_step
from worker.backends.cuda.step_values import Command, DeviceCopy, StepMemory
from worker.backends.cuda.transfers import PinnedBuffers, Transfers
from worker.backends.cuda.weight_image import WeightImage, choose_activation, lay_out_weights
from worker.backends.cuda.weight_stream import PinnedRing, StreamSettings, WeightStream
from worker.backends.cuda.workspace import Workspace
from worker.backends.cuda_kernels import Activation
from worker.backends.protocol import BackendError, FloatArray, ModelPlan, SequenceInput
from worker.backends.sampling_rows import SampledToken, SamplingRow

#: Graphs kept at most; each is a few hundred kilobytes of the driver's memory.
MAX_GRAPHS: Final = 32


@dataclass(frozen=True, slots=True)
class CudaResources:
    """What outlives a model in its worker: made when the worker warms up."""

    device: Device
    ring: PinnedRing
    pinned: PinnedBuffers
    settings: StreamSettings
    quantised_activation: Activation = "bf16"
    uses_graphs: bool = True


class CudaModel:
    """See :class:`~worker.backends.protocol.BoundModel`. Engine thread only, besides its readers of weights."""

    def __init__(self, plan: ModelPlan, resources: CudaResources) -> None:
        """Weights begin to arrive at once.

        Raises:
            BackendError: an operation, dtype or shape without a kernel.
            OutOfDeviceMemory: the weights do not fit.
        """
        self._resources, device = resources, resources.device
        self._device = device
        self._layout: WeightImage = lay_out_weights(plan, resources.settings.slot_bytes)
        activation = choose_activation(self._layout, _linear_handles(plan), resources.quantised_activation)
        programs = {
            program.kind: CudaProgram(program, plan, self._layout, activation, device.num_processors)
            for program in (plan.prefill, plan.decode)
        }
        self._programs = programs
        self._context_length, self._vocab_size = plan.context_length, plan.vocab_size
        self._compute = device.make_stream()
        self._done: Event = device.make_event()
        self._transfers = Transfers(device, self._compute, resources.pinned)
        shape = (plan.num_layers, plan.num_kv_heads, plan.head_dim)
        self._kv = KvPool(device, self._compute, self._transfers, shape, activation)
        self._workspace = Workspace(device, self._on_growth)
        self._sampler = DeviceSampler(device, self._compute, self._transfers, self._synchronise, plan.vocab_size)
        self._graphs: dict[StepShape, tuple[Graph, Place]] = {}
        self._uncaptured: set[StepShape] = set()  # whose capture the device refused: they run command by command
        self._num_growths = self._num_steps = self._num_tokens = self._num_replays = 0
        self._num_rows = 0  # of the latest step
        self._blob: ByteArray | None = None if plan.blob is None else plan.blob.data
        self._is_registered = False
        self._is_closed = False
        self._num_dropped_blocks = 0  # that come back, empty, with the weights
        self._on_kv_dropped: Callable[[], None] = lambda: None
        self._newest_piece = -1  # that the compute stream has waited for
        self._image: Place | None = None
        self._weights: WeightStream | None = None
        self._logits = self._workspace.take("logits", 0)
        self.unpark()

    @property
    def kv_block_bytes(self) -> int:
        return self._kv.block_bytes

    def prepare_step(self, num_tokens: int) -> None:
        """Nothing: commands are made while weights arrive."""

    def open_kv(self, num_blocks: int) -> None:
        self._kv.open(num_blocks)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        self._kv.copy(pairs)

    def release_blocks(self, blocks: Sequence[int]) -> None:
        """Nothing: the pool is one allocation."""

    def capture_prefix(self, block_table: Sequence[int], num_tokens: int) -> FloatArray:
        return self._kv.capture_prefix(block_table, num_tokens)

    def restore_prefix(self, block_table: Sequence[int], keys_values: FloatArray) -> None:
        self._kv.restore_prefix(block_table, keys_values)

    def step(self, inputs: tuple[SequenceInput, ...]) -> None:
        """See :class:`~worker.backends.protocol.BoundModel`. Returns when all is queued.

        Raises:
            BlobCorrupt: weights are not what was signed.
            OutOfDeviceMemory: the step's scratch memory does not fit.
            DeviceLost: the device is beyond help.
        """
        check_inputs(inputs, self._kv.num_blocks, self._context_length)
        shape = choose_shape(inputs)
        step = self._send(inputs, shape)
        graph = self._find_graph(shape, step)
        if graph is not None:
            self._device.replay(graph[0], self._compute)
            self._logits = graph[1]
            self._num_replays += 1
        else:
            commands, self._logits = self._list_commands(shape, step)
            for command in commands:
                self._queue(command)
        self._num_rows = sum(item.num_logits for item in inputs)
        self._num_steps += 1
        self._num_tokens += sum(len(item.token_ids) for item in inputs)

    def logits(self) -> FloatArray:
        """See :class:`~worker.backends.protocol.BoundModel`: a copy, whose making waits for the step."""
        used = self._logits.part(0, 4 * self._vocab_size * self._num_rows)
        received = self._transfers.receive(used)
        return received.view(np.float32).reshape(self._num_rows, self._vocab_size).copy()

    def sample(self, rows: Sequence[SamplingRow]) -> list[SampledToken]:
        return self._sampler.sample(self._logits, rows)

    def statistics(self) -> Mapping[str, int]:
        return {
            "num_steps": self._num_steps,
            "num_tokens": self._num_tokens,
            "num_graph_replays": self._num_replays,
            "num_graphs": len(self._graphs),
            "weights_bytes": 0 if self._image is None else self._image.num_bytes,
            "weights_pieces": len(self._layout.pieces),
            "weights_queued_us": 0 if self._weights is None else round(self._weights.queued_ms * 1000),
            "workspace_bytes": self._workspace.num_bytes + self._sampler.num_bytes,
            "kv_resident_bytes": self._kv.num_blocks * self._kv.block_bytes,
            "kv_spare_bytes": 0,
        }

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._drop_weights()
        self._kv.close()
        self._workspace.close()
        self._sampler.close()
        self._unregister()
        self._blob = None
        self._programs.clear()
        self._layout.pieces.clear()

    # --- parked -----------------------------------------------------------------------------------------------------

    @property
    def is_parked(self) -> bool:
        """Whether the weights are off the device."""
        return self._image is None

    def park(self, *, keeps_kv: bool = False, locks_source: bool = True) -> None:
        """See :class:`~worker.backends.protocol.Parkable`: the memory goes to the driver, the workspace's too.

        With ``locks_source`` the weights' sealed host memory is page-locked meanwhile, so that :meth:`unpark` is one
        copy without a ring (about 0.4 s a GiB, while nobody waits). Without, no page of it stays locked.
        """
        if not self.is_parked:
            self._drop_weights()
            if not keeps_kv:
                self._num_dropped_blocks = self._kv.num_blocks
                self._kv.close()
                self._on_kv_dropped()
            self._workspace.close()
            self._sampler.close()
        if not locks_source:
            self._unregister()
        elif self._blob is not None and not self._is_registered:
            self._is_registered = self._device.register(self._blob)

    def unpark(self) -> None:
        """Begin to bring the weights back, verified like the first time, with empty KV blocks where they were dropped.
        Idempotent.

        Raises:
            OutOfDeviceMemory: somebody else took the room; still parked.
        """
        if not self.is_parked:
            return
        image = self._device.allocate(self._layout.num_bytes)
        resources = self._resources
        try:
            if self._num_dropped_blocks:
                self._kv.open(self._num_dropped_blocks)
            self._weights = WeightStream(
                *(self._device, resources.ring, self._layout.pieces, image, resources.settings),
                is_blob_pinned=self._is_registered,
            )
        except BaseException:
            if self._num_dropped_blocks:
                self._kv.close()
            self._device.free(image)
            raise
        self._num_dropped_blocks = 0
        self._image, self._newest_piece = image, -1
        self._weights.start()

    def watch_kv(self, on_dropped: Callable[[], None]) -> None:
        self._on_kv_dropped = on_dropped

    def read_free_bytes(self) -> int:
        return self._device.read_memory().free_bytes

    def wait_weights(self) -> None:
        """Block until all weights are on the device.

        Raises:
            BlobCorrupt: they are not what was signed.
        """
        if self._weights is not None:
            self._weights.synchronise()

    def _unregister(self) -> None:
        if self._is_registered and self._blob is not None:
            self._device.unregister(self._blob)
        self._is_registered = False

    def _drop_weights(self) -> None:
        if self._weights is not None:
            self._weights.close()
            self._weights = None
        self._synchronise()
        self._graphs.clear()
        if self._image is not None:
            self._device.free(self._image)
            self._image = None

    # --- steps ------------------------------------------------------------------------------------------------------

    def _send(self, inputs: tuple[SequenceInput, ...], shape: StepShape) -> Place:
        place = self._workspace.take("step", 4 * shape.num_ints)
        pinned = self._transfers.take_in(place.num_bytes)
        fill_step(pinned.view(np.int32), shape, inputs)
        self._transfers.send(place, pinned)
        return place

    def _list_commands(self, shape: StepShape, step: Place) -> tuple[list[Command], Place]:
        """Again while areas grow: commands hold addresses."""
        if self._image is None:
            raise BackendError("the model is parked: unpark it before a step")
        places = place_step(step, shape)
        program = self._programs[ProgramKind.DECODE if shape.is_decode else ProgramKind.PREFILL]
        while True:
            memory = StepMemory(places, self._image, self._kv.pool, self._workspace.take)
            num_growths = self._num_growths
            listed = program.list_commands(shape, memory)
            if num_growths == self._num_growths:
                return listed

    def _find_graph(self, shape: StepShape, step: Place) -> tuple[Graph, Place] | None:
        """The graph of a decode's shape, captured when it is first wanted; None: run it command by command."""
        if not (shape.is_decode and self._resources.uses_graphs and self._weights is not None):
            return None
        if shape in self._uncaptured:
            return None
        if not self._weights.is_queued:
            return None  # each command still has to wait for its own weights
        found = self._graphs.get(shape)
        if found is None:
            commands, logits = self._list_commands(shape, step)
            self._weights.wait_for(len(self._layout.pieces) - 1, self._compute)

            def enqueue() -> None:
                for command in commands:
                    self._run(command)

            if len(self._graphs) >= MAX_GRAPHS:
                self._synchronise()
                self._graphs.clear()
            try:
                found = self._graphs[shape] = (self._device.capture(self._compute, enqueue), logits)
            except CaptureRefused as error:
                self._uncaptured.add(shape)
                structlog.get_logger().warning(
                    "decode_graph_refused", num_sequences=shape.num_sequences, error=str(error)
                )
        return found

    def _queue(self, command: Command) -> None:
        if self._weights is not None and command.last_piece > self._newest_piece:
            self._weights.wait_for(command.last_piece, self._compute)
            self._newest_piece = command.last_piece  # and with it all before: copies are queued in order
        self._run(command)

    def _run(self, command: Command) -> None:
        work = command.work
        if isinstance(work, MatrixProduct):
            self._device.multiply(work, self._compute)
        elif isinstance(work, DeviceCopy):
            self._device.copy(work.target, work.source, self._compute)
        else:
            self._device.launch(work, self._compute)

    def _on_growth(self) -> None:
        self._num_growths += 1
        self._synchronise()
        self._graphs.clear()

    def _synchronise(self) -> None:
        self._device.record(self._done, self._compute)
        self._device.synchronise(self._done)


def _linear_handles(plan: ModelPlan) -> list[int]:
    return [
        operation.tensors[0]
        for program in (plan.prefill, plan.decode)
        for operation in program.operations
        if operation.opcode is Opcode.LINEAR
    ]
