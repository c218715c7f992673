"""The GPU backend: what a worker makes when it warms up, and how it binds a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from snapshots.block_types import BLOCK_TYPES
from worker.backends import cuda_kernels as kernels
from worker.backends.cuda.cuda_model import CudaModel, CudaResources
from worker.backends.cuda.device import ACTIVATION_BYTES, Device, MatrixProduct
from worker.backends.cuda.sample_model import TINY, SampleShape, make_sample_plan
from worker.backends.cuda.transfers import PinnedBuffers
from worker.backends.cuda.weight_stream import PinnedRing, StreamSettings
from worker.backends.cuda_kernels import Activation
from worker.backends.encoder_protocol import BoundEncoder, EncoderPlan
from worker.backends.protocol import BackendError, BoundModel, ModelPlan, SequenceInput
from worker.backends.sampling_rows import SamplingRow


class CudaBackend:
    """One GPU. Nothing touches the device before :meth:`warm`, which no zygote calls.

    ``make_device`` opens it: CuPy's, or the emulated one. ``make_encoder_backend`` runs encoders, on the CPU.
    """

    name = "cuda"
    binds_before_fork = False
    waits_for_weights = True

    def __init__(
        self,
        make_device: Callable[[], Device],
        settings: StreamSettings | None = None,
        *,
        quantised_activation: Activation = "bf16",
        uses_graphs: bool = True,
        bind_encoder: Callable[[EncoderPlan], BoundEncoder] | None = None,
    ) -> None:
        self._make_device = make_device
        self._settings = settings or StreamSettings()
        self._quantised_activation: Activation = quantised_activation
        self._uses_graphs = uses_graphs
        self._bind_encoder = bind_encoder
        self._resources: CudaResources | None = None

    def warm(self) -> None:
        """Context, modules, matrix library, pinned ring, and every kernel of a decoder once, tiny. Seconds. Idempotent.

        Raises:
            DeviceError: no device, or its driver is too old for the kernels.
        """
        if self._resources is not None:
            return
        device = self._make_device()
        ring = PinnedRing(device, self._settings)
        pinned = PinnedBuffers(device)
        resources = CudaResources(device, ring, pinned, self._settings, self._quantised_activation, self._uses_graphs)
        _warm_products(device)
        for stored in ("bf16", "f32", "f16", "int8", "fp8", "int4"):
            _warm_kernels(resources, TINY, stored)
        _warm_kernels(resources, replace(TINY, head_dim=128), "bf16")  # attention of the larger models
        _warm_blocks(device, self._quantised_activation)
        self._resources = resources

    def bind(self, plan: ModelPlan) -> BoundModel:
        """Lay the weights out and begin to bring them; returns before they are there. Warms up if nobody did.

        Raises:
            BackendError: a program or weight that the kernels cannot run.
            OutOfDeviceMemory: the weights do not fit.
        """
        self.warm()
        if self._resources is None:
            raise BackendError("the device was not opened")
        return CudaModel(plan, self._resources)

    def bind_encoder(self, plan: EncoderPlan) -> BoundEncoder:
        """Encoders run on the CPU: they are small, and have no kernels here.

        Raises:
            BackendError: this backend was made without a CPU backend.
        """
        if self._bind_encoder is None:
            raise BackendError("encoders run on the CPU backends only: use numkong")
        return self._bind_encoder(plan)


def _warm_kernels(resources: CudaResources, shape: SampleShape, stored: str) -> None:
    """A prefill, a decode and a draw of each kind with a model of a few kilobytes, so that no module loads lazily in a
    request (lazy loading makes a first inference 6 to 7 times slower)."""
    model = CudaModel(make_sample_plan(shape, stored, chunk_bytes=resources.settings.slot_bytes), resources)
    try:
        model.open_kv(4)
        model.step((SequenceInput((0, 1), 0, tuple(range(20))), SequenceInput((2,), 0, (1,), num_logits=0)))
        model.wait_weights()
        for _ in range(2):  # the graph is captured once and replayed
            model.step((SequenceInput((0, 1), 20, (1,)),))
            model.step((SequenceInput((0, 1), 20, (1,)), SequenceInput((2,), 1, (1,))))
        if stored == "bf16":  # logits are float32 for all
            model.sample([SamplingRow(0), SamplingRow(1)])
            model.sample([SamplingRow(0, 0.5, 1.0, top_k=5, top_p=0.9, num_top_logprobs=2)])
    finally:
        model.close()


def _warm_blocks(device: Device, activation: Activation) -> None:
    """What reads GGUF's blocks, one launch each: the decoders above have none."""
    stream, done, width = device.make_stream(), device.make_event(), 256
    place = device.allocate(3 * 4096)
    device.fill(place, 0, stream)
    out, x, blocks = (place.part(i * 4096, 4096) for i in range(3))
    for name in map(str.lower, BLOCK_TYPES):
        for num_rows in (1, 2):
            sizes = {"num_rows": num_rows, "num_outputs": 1, "width": width}
            device.launch(kernels.gemv(name, activation, out, x, blocks, 0, 0, bias_type=0, **sizes), stream)
        rows: tuple[Activation, ...] = ("f32", activation)
        for kind in rows:
            gathered = kernels.gather_rows(name, kind, out, blocks, 0, 0, num_rows=1, num_table_rows=1, width=width)
            device.launch(gathered, stream)
    device.record(done, stream)
    device.synchronise(done)
    device.free(place)


def _warm_products(device: Device) -> None:
    """The matrix library's handle and workspace, for each type of product."""
    stream, done = device.make_stream(), device.make_event()
    place = device.allocate(4 * 3 * 64 * 64)
    device.fill(place, 0, stream)
    out, x, weights = (place.part(i * 4 * 64 * 64, 4 * 64 * 64) for i in range(3))
    for activation in ACTIVATION_BYTES:
        for wide in (False, True):
            sizes = {"num_rows": 64, "num_outputs": 64, "width": 64, "out_stride": 64}
            product = MatrixProduct(activation, out, x, weights, **sizes, out_is_float32=wide, adds=wide)
            device.multiply(product, stream)
    device.record(done, stream)
    device.synchronise(done)
    device.free(place)
