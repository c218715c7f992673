"""``python -m worker.benchmarks.gpu_ladder``: wakes and steps of one GPU with made-up models, as JSON.

Inside one process and without HTTP: tiers as the backend sees them. T2 begins with a warm worker and weights in host
memory, T3 with a parked model, T4 is serving. ``make gpu-check`` runs it and writes what it printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from worker.backends.cores import count_usable_cores
from worker.backends.cuda.cuda_backend import CudaBackend
from worker.backends.cuda.cuda_model import CudaModel, CudaResources
from worker.backends.cuda.device import Device, DeviceError
from worker.backends.cuda.opening import open_device
from worker.backends.cuda.sample_model import LLAMA_1B, LLAMA_8B, TINY, SampleShape, make_sample_plan
from worker.backends.cuda.transfers import PinnedBuffers
from worker.backends.cuda.weight_stream import PinnedRing, StreamSettings
from worker.backends.protocol import ModelPlan, SequenceInput
from worker.backends.sampling_rows import SamplingRow

SHAPES: Final = {"tiny": TINY, "1b": LLAMA_1B, "8b": LLAMA_8B}
PROMPT_TOKENS: Final = 32
NUM_BLOCKS: Final = 512
BATCHES: Final = (1, 8, 32)
NUM_STEPS: Final = 20
#: (threads, slots, bytes of a slot) of the sweep.
SWEEP: Final = tuple(
    (threads, slots, mib << 20) for threads in (2, 4, 8, 16) for slots in (8, 16) for mib in (2, 4, 8, 16)
)

Figures = dict[str, Any]


def fill_random(name: str, array: npt.NDArray[Any]) -> None:
    """Weights that keep logits finite: bytes of one random block again and again, small in every type."""
    if array.ndim == 1:
        return
    block = np.random.default_rng(len(name)).standard_normal(1 << 16).astype(np.float32)
    scaled: npt.NDArray[Any]
    if array.dtype == np.uint8:  # two 4-bit weights a byte: any byte stands for some
        scaled = np.random.default_rng(len(name)).integers(0, 256, block.shape)
    elif array.dtype == np.int8:
        scaled = np.rint(block * 20).clip(-127, 127)
    else:
        scaled = block * np.float32(array.shape[1] ** -0.5)
    flat, pattern = array.reshape(-1), scaled.astype(array.dtype)
    for start in range(0, flat.size, pattern.size):
        flat[start : start + pattern.size] = pattern[: flat.size - start]


def measure_copy_ceiling(device: Device, num_bytes: int, num_rounds: int = 5) -> float:
    """Bytes a second from pinned memory to the device in one large copy each, the median."""
    stream, event = device.make_stream(), device.make_event()
    pinned, place = device.pin(num_bytes), device.allocate(num_bytes)

    def copy() -> None:
        device.copy_in(place, pinned, stream)
        device.record(event, stream)
        device.synchronise(event)

    copy()
    rate = num_bytes / statistics.median(measure(copy, num_rounds))
    device.free(place)
    return rate


def measure_memory_bandwidth(device: Device, num_bytes: int, num_rounds: int = 5) -> float:
    """Bytes a second that the device's memory moves, read and written, by copies within it."""
    stream, event = device.make_stream(), device.make_event()
    source, target = device.allocate(num_bytes), device.allocate(num_bytes)

    def copy() -> None:
        device.copy(target, source, stream)
        device.record(event, stream)
        device.synchronise(event)

    copy()
    rate = 2 * num_bytes / statistics.median(measure(copy, num_rounds))
    device.free(source)
    device.free(target)
    return rate


def measure(work: Callable[[], object], num_rounds: int) -> list[float]:
    """Seconds of each round."""
    elapsed = []
    for _ in range(num_rounds):
        begin_s = time.perf_counter()
        work()
        elapsed.append(time.perf_counter() - begin_s)
    return elapsed


def serve_first_token(model: CudaModel) -> int:
    """Prefill and one greedy token."""
    model.step((SequenceInput((0, 1, 2), 0, tuple(range(PROMPT_TOKENS))),))
    return model.sample([SamplingRow(0)])[0].token_id


def measure_wake(plan: ModelPlan, resources: CudaResources) -> float:
    """T2: seconds from binding to the first token, in a warm worker."""
    begin_s = time.perf_counter()
    model = CudaModel(plan, resources)
    try:
        model.open_kv(NUM_BLOCKS)
        serve_first_token(model)
        return time.perf_counter() - begin_s
    finally:
        model.close()


def measure_resumes(model: CudaModel, num_rounds: int) -> Iterator[tuple[float, float]]:
    """T3: seconds to the first token of a parked model, and seconds that parking took."""
    for _ in range(num_rounds):
        begin_s = time.perf_counter()
        model.park()
        parked_s = time.perf_counter() - begin_s
        begin_s = time.perf_counter()
        model.unpark()
        serve_first_token(model)
        yield time.perf_counter() - begin_s, parked_s


def measure_decode(model: CudaModel, batch: int, num_steps: int) -> float:
    """Seconds of a decode step of ``batch`` sequences, the median; a token is sampled for each."""
    tables = [(3 + 2 * i, 4 + 2 * i) for i in range(batch)]
    rows = [SamplingRow(i) for i in range(batch)]

    def run(position: int) -> None:
        model.step(tuple(SequenceInput(table, position, (1,)) for table in tables))
        model.sample(rows)

    for position in range(3):
        run(position)
    positions = iter(range(3, 3 + num_steps))
    return statistics.median(measure(lambda: run(next(positions)), num_steps))


def measure_copies(model: CudaModel, num_rounds: int) -> list[float]:
    """Seconds from the order to come back until all weights are on the device, verified: the copy phase of T3."""
    elapsed = []
    for _ in range(num_rounds):
        model.park()
        begin_s = time.perf_counter()
        model.unpark()
        model.wait_weights()
        elapsed.append(time.perf_counter() - begin_s)
    return elapsed


def measure_queueing(model: CudaModel, num_steps: int) -> float:
    """Seconds that the host takes to queue a decode step, nothing waited for: what launching costs."""
    elapsed = []
    for position in range(num_steps):
        begin_s = time.perf_counter()
        model.step((SequenceInput((3, 4), position, (1,)),))
        elapsed.append(time.perf_counter() - begin_s)
        model.sample([SamplingRow(0)])
    return statistics.median(elapsed)


def measure_model(
    shape: SampleShape, stored: str, resources: CudaResources, num_rounds: int, num_steps: int
) -> Figures:
    """Wakes with and without verification, resumes, and decode steps of one model."""
    plan = make_sample_plan(shape, stored, fill_random)
    num_bytes = plan.blob.data.nbytes if plan.blob is not None else 0
    unverified = replace(resources, settings=replace(resources.settings, verifies=False))
    figures: Figures = {"weights_bytes": num_bytes, "stored": stored}
    for name, used in (("", resources), ("_unverified", unverified)):
        figures[f"t2_spare{name}_ms"] = _milliseconds([measure_wake(plan, used) for _ in range(num_rounds)])
        figures |= _measure_parked(plan, used, num_rounds, name)
    figures |= _measure_steps(plan, resources, num_bytes, num_steps)
    return figures


def _measure_parked(plan: ModelPlan, resources: CudaResources, num_rounds: int, name: str) -> Figures:
    model = CudaModel(plan, resources)
    try:
        model.open_kv(NUM_BLOCKS)
        serve_first_token(model)
        resumes, parkings = zip(*measure_resumes(model, num_rounds), strict=True)
        copies = measure_copies(model, num_rounds)
        model.park()
        memory = resources.device.read_memory()
        num_bytes = plan.blob.data.nbytes if plan.blob is not None else 0
        return {
            f"t3{name}_ms": _milliseconds(resumes),
            f"park{name}_ms": _milliseconds(parkings),
            f"t3_copy{name}_bytes_per_s": round(num_bytes / statistics.median(copies)),
            f"parked{name}_device_used_bytes": memory.total_bytes - memory.free_bytes,
        }
    finally:
        model.close()


def _measure_steps(plan: ModelPlan, resources: CudaResources, num_bytes: int, num_steps: int) -> Figures:
    """Decode steps by graph at each batch size, eager ones, and what queueing them costs."""
    found: Figures = {}
    for name, uses_graphs in (("", True), ("_eager", False)):
        model = CudaModel(plan, replace(resources, uses_graphs=uses_graphs))
        try:
            model.open_kv(NUM_BLOCKS)
            serve_first_token(model)
            model.wait_weights()
            batches = [batch for batch in BATCHES if batch <= num_steps * 2]
            steps = {batch: measure_decode(model, batch, num_steps) for batch in batches}
            found[f"decode{name}_ms"] = {str(batch): round(seconds * 1e3, 3) for batch, seconds in steps.items()}
            found[f"queueing{name}_ms"] = round(measure_queueing(model, num_steps) * 1e3, 4)
            found[f"num_graphs{name}"] = model.statistics()["num_graphs"]
            if uses_graphs:
                found["decode_bytes_per_s"] = num_bytes / steps[1]
                found["bytes_per_s_by_batch"] = {str(batch): round(num_bytes / s) for batch, s in steps.items()}
        finally:
            model.close()
    return found


def sweep_stream(shape: SampleShape, device: Device, settings: StreamSettings) -> list[Figures]:
    """Bytes a second of the whole stream of weights for each setting of :data:`SWEEP`."""
    plan = make_sample_plan(shape, "bf16", fill_random)
    num_bytes = plan.blob.data.nbytes if plan.blob is not None else 0
    rows, pinned = [], PinnedBuffers(device)
    for threads, slots, slot_bytes in SWEEP:
        tried = replace(settings, num_threads=threads, num_slots=slots, slot_bytes=slot_bytes)
        resources = CudaResources(device, PinnedRing(device, tried), pinned, tried)
        rates = []
        for _ in range(2):
            begin_s = time.perf_counter()
            model = CudaModel(plan, resources)
            model.wait_weights()
            rates.append(num_bytes / (time.perf_counter() - begin_s))
            model.close()
        rows.append({"threads": threads, "slots": slots, "slot_bytes": slot_bytes, "bytes_per_s": round(max(rates))})
    return rows


def _milliseconds(seconds: Any) -> Figures:
    return {"median": round(statistics.median(seconds) * 1000, 2), "all": [round(one * 1000, 2) for one in seconds]}


def run_ladder(
    device: Device,
    shapes: list[tuple[str, str]],
    num_rounds: int,
    *,
    sweeps: bool,
    probe_bytes: int,
    num_steps: int = NUM_STEPS,
) -> Figures:
    """All figures of ``device`` for ``(shape, stored)`` models."""
    settings = StreamSettings.for_cores(count_usable_cores())
    resources = CudaResources(device, PinnedRing(device, settings), PinnedBuffers(device), settings)
    memory = device.read_memory()
    figures: Figures = {
        "architecture": device.architecture,
        "multiprocessors": device.num_processors,
        "device_total_bytes": memory.total_bytes,
        "device_used_warm_bytes": memory.total_bytes - memory.free_bytes,
        "stream": {"threads": settings.num_threads, "slots": settings.num_slots, "slot_bytes": settings.slot_bytes},
        "copy_ceiling_bytes_per_s": measure_copy_ceiling(device, probe_bytes),
        "memory_bytes_per_s": measure_memory_bandwidth(device, probe_bytes),
        "models": {
            f"{name}-{stored}": measure_model(SHAPES[name], stored, resources, num_rounds, num_steps)
            for name, stored in shapes
        },
    }
    if sweeps:
        figures["sweep"] = sweep_stream(SHAPES[shapes[0][0]], device, settings)
    return figures


def main() -> int:
    """Command line; 3 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", type=int, default=0)
    parser.add_argument("--models", default="1b-bf16,8b-bf16,8b-int4", help="shape-type, comma separated")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--probe-mib", type=int, default=1024, help="size of the copies that show the ceilings")
    parser.add_argument("--sweep", action="store_true", help="try threads, slots and slot sizes with the first model")
    options = parser.parse_args()
    shapes = [(name, stored) for name, _, stored in (one.partition("-") for one in options.models.split(",") if one)]
    try:
        opened = measure_opening(options.device)
        device = opened.pop("device")
    except DeviceError as error:
        print(f"no GPU at hand: {error}", file=sys.stderr)
        return 3
    probe_bytes = options.probe_mib << 20
    figures = run_ladder(device, shapes, options.rounds, sweeps=options.sweep, probe_bytes=probe_bytes)
    print(json.dumps({**opened, **figures}, indent=1))
    ceilings = figures["copy_ceiling_bytes_per_s"] / 1e9, figures["memory_bytes_per_s"] / 1e9
    print(f"{len(shapes)} models; pinned copy {ceilings[0]:.1f} GB/s, device memory {ceilings[1]:.0f} GB/s")
    return 0


def measure_opening(number: int) -> Figures:
    """What a spare worker costs: milliseconds to context and modules and to all that warm-up does, and device memory
    then, of all processes. ``device`` is the device, open.

    Raises:
        DeviceError: there is none.
    """
    begin_s = time.perf_counter()
    device = open_device(number)
    opened_s = time.perf_counter()
    CudaBackend(lambda: device).warm()
    memory = device.read_memory()
    return {
        "device": device,
        "context_and_modules_ms": round((opened_s - begin_s) * 1e3, 1),
        "warm_up_ms": round((time.perf_counter() - opened_s) * 1e3, 1),
        "spare_device_used_bytes": memory.total_bytes - memory.free_bytes,
    }


if __name__ == "__main__":
    sys.exit(main())
