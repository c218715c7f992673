"""The GPU backend on the emulated device: real kernels on the CPU, streams and events as only rules of order."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
from cuda_fixtures import emulator

from snapshots.chunks import digest_chunks
from worker.backends.cuda.cuda_backend import CudaBackend
from worker.backends.cuda.cuda_model import CudaModel, CudaResources
from worker.backends.cuda.emulated_device import EmulatedDevice
from worker.backends.cuda.transfers import PinnedBuffers
from worker.backends.cuda.weight_stream import PinnedRing, StreamSettings
from worker.backends.protocol import ModelPlan, WeightBlob

#: Small enough that a tiny model takes several rounds of the ring.
SETTINGS = StreamSettings(num_threads=3, num_slots=3, slot_bytes=4096)


def make_device(seed: int = 0, capacity_bytes: int = 1 << 30) -> EmulatedDevice:
    """A device whose queued work runs in an order drawn from ``seed``."""
    return EmulatedDevice(emulator().launch, seed=seed, capacity_bytes=capacity_bytes)


@functools.cache
def emulated_backend() -> CudaBackend:
    """One for the run, warmed by its first use; exact float32 activations for quantised weights."""
    return CudaBackend(make_device, SETTINGS, quantised_activation="f32")


def make_resources(device: EmulatedDevice, settings: StreamSettings = SETTINGS, **options: bool) -> CudaResources:
    """What a warmed worker has, without the time of warming up."""
    return CudaResources(device, PinnedRing(device, settings), PinnedBuffers(device), settings, "f32", **options)


def bind(plan: ModelPlan, device: EmulatedDevice, num_blocks: int = 16, **options: bool) -> CudaModel:
    """``plan`` on ``device``, with KV blocks."""
    model = CudaModel(plan, make_resources(device, **options))
    model.open_kv(num_blocks)
    return model


def put_in_blob(plan: ModelPlan, chunk_bytes: int = 1024) -> ModelPlan:
    """``plan`` with its weights in one piece of memory with digests, as a sealed snapshot has them."""
    starts = np.cumsum([0] + [-(-tensor.data.nbytes // 64) * 64 for tensor in plan.tensors])
    data = np.zeros(int(starts[-1]) + 1000, np.uint8)
    tensors = []
    for start, tensor in zip(starts, plan.tensors, strict=False):
        view = data[start : start + tensor.data.nbytes].view(tensor.data.dtype).reshape(tensor.data.shape)
        view[...] = tensor.data
        tensors.append(replace(tensor, data=view))
    digests = digest_chunks(memoryview(data), chunk_bytes)
    return replace(plan, tensors=tuple(tensors), blob=WeightBlob(data, chunk_bytes, digests))
