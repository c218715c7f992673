"""The emulator itself: each class of fault that it is there to find is seeded, and found."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from cuda_fixtures import CACHE_FOLDER, emulator, poisoned

from worker.backends.cuda_kernels import Launch
from worker.backends.kernels.emulation.emulator import EmulationError, KernelEmulator, ThreadOrder, build_library
from worker.backends.kernels.sources import KERNELS_FOLDER

FAULTY = """
#include "device.cuh"
#define SHARED reinterpret_cast<float*>(SHARED_MEMORY)
// Each block sums 64 numbers through shared memory; the missing line is the fault.
KERNEL(64) right(float* out, const float* in) {
    SHARED[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    if (threadIdx.x == 0) { float s = 0; for (int i = 0; i < 64; i++) s += SHARED[i]; SHARED[0] = s; }
    __syncthreads();
    out[threadIdx.x] = SHARED[0];
}
KERNEL(64) no_barrier_after_write(float* out, const float* in) {
    SHARED[threadIdx.x] = in[threadIdx.x];
    if (threadIdx.x == 0) { float s = 0; for (int i = 0; i < 64; i++) s += SHARED[i]; SHARED[0] = s; }
    __syncthreads();
    out[threadIdx.x] = SHARED[0];
}
KERNEL(64) no_barrier_before_read(float* out, const float* in) {
    SHARED[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    if (threadIdx.x == 0) { float s = 0; for (int i = 0; i < 64; i++) s += SHARED[i]; SHARED[0] = s; }
    out[threadIdx.x] = SHARED[0];
}
KERNEL(64) no_barrier_before_reuse(float* out, const float* in) {
    float total = 0;
    for (int round = 0; round < 2; round++) {
        SHARED[threadIdx.x] = in[threadIdx.x] * (round + 1);
        __syncthreads();
        for (int i = 0; i < 64; i++) total += SHARED[i];
    }
    out[threadIdx.x] = total / 3;
}
KERNEL(64) unwritten_shared(float* out, const float* in) {
    if (threadIdx.x < 63) SHARED[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    float s = 0; for (int i = 0; i < 64; i++) s += SHARED[i];
    out[threadIdx.x] = s;
}
KERNEL(64) barrier_after_exit(float* out, const float* in) {
    if (threadIdx.x >= 60) return;
    __syncthreads();
    out[threadIdx.x] = in[threadIdx.x];
}
KERNEL(64) divergent_shuffle(float* out, const float* in) {
    if (threadIdx.x % 2) out[threadIdx.x] = warp_sum(in[threadIdx.x]);
}
KERNEL(64) foreign_mask(float* out, const float* in) {
    out[threadIdx.x] = __shfl_xor_sync(1u, in[threadIdx.x], 1);
}
KERNEL(64) reads_past_end(float* out, const float* in) { out[threadIdx.x] = in[threadIdx.x + 1]; }
KERNEL(64) writes_past_end(float* out, const float* in) { out[threadIdx.x + 1] = in[threadIdx.x]; }
KERNEL(64) writes_before_start(float* out, const float* in) { out[(int)threadIdx.x - 2048] = in[threadIdx.x]; }
KERNEL(64) shared_past_end(float* out, const float* in) {
    SHARED[threadIdx.x + 1] = out[threadIdx.x] = in[threadIdx.x];
}
KERNEL(64) misaligned(float* out, const float* in) {
    float four[4];
    load_elements<float, 4>(in + 1, four);
    out[threadIdx.x] = four[0];
}
KERNEL_ENTRY(right) KERNEL_ENTRY(no_barrier_after_write) KERNEL_ENTRY(no_barrier_before_read)
KERNEL_ENTRY(no_barrier_before_reuse) KERNEL_ENTRY(unwritten_shared) KERNEL_ENTRY(barrier_after_exit)
KERNEL_ENTRY(divergent_shuffle) KERNEL_ENTRY(foreign_mask) KERNEL_ENTRY(reads_past_end) KERNEL_ENTRY(writes_past_end)
KERNEL_ENTRY(writes_before_start) KERNEL_ENTRY(shared_past_end) KERNEL_ENTRY(misaligned)
"""
INPUT = np.arange(1, 65, dtype=np.float32)


@functools.cache
def faulty() -> KernelEmulator:
    """The kernels above."""
    return KernelEmulator(build_library(FAULTY, KERNELS_FOLDER, CACHE_FOLDER))


def run(name: str, order: ThreadOrder, in_: object = INPUT) -> np.ndarray:
    """What the kernel writes to a poisoned output."""
    out = poisoned(64)
    faulty().launch(Launch(name, (1, 1, 1), (64, 1, 1), 256, (out, in_)), order)
    return out


def test_the_right_kernel_is_right() -> None:
    """With all its barriers the sum is the same in every order."""
    for order in ThreadOrder:
        np.testing.assert_array_equal(run("right", order), np.full(64, INPUT.sum()))


@pytest.mark.parametrize(
    "name",
    ["no_barrier_after_write", "no_barrier_before_read", "no_barrier_before_reuse", "unwritten_shared"],
)
def test_a_race_shows_in_some_order(name: str) -> None:
    """A missing barrier, or a read of shared memory that nobody wrote, changes the result in at least one order."""
    wrong = [order for order in ThreadOrder if not (run(name, order) == np.float32(INPUT.sum())).all()]
    assert wrong


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("barrier_after_exit", r"barrier divergence in block \(0, 0, 0\).*60 threads at a barrier, 4 exited"),
        ("divergent_shuffle", "warp collective divergence"),
        ("foreign_mask", "mask leaves out the calling lane"),
        ("reads_past_end", r"out of bounds at .*thread \(63, 0, 0\)"),
        ("writes_past_end", r"out of bounds at .*thread \(63, 0, 0\)"),
        ("writes_before_start", "out of bounds"),
        ("shared_past_end", r"out of bounds at .*thread \(63, 0, 0\)"),
        ("misaligned", "misaligned vector access"),
    ],
)
def test_a_fault_is_an_error_that_names_the_thread(name: str, message: str) -> None:
    """Divergence, accesses out of bounds and misaligned loads end the launch; the next launch works."""
    for order in (ThreadOrder.ASCENDING, ThreadOrder.DESCENDING):
        with pytest.raises(EmulationError, match=message if order == ThreadOrder.ASCENDING else None):
            run(name, order)
    test_the_right_kernel_is_right()


def test_a_null_pointer_that_is_followed_is_an_error() -> None:
    """0 stands for a null pointer, which some arguments may be; this one may not."""
    with pytest.raises(EmulationError, match="out of bounds at"):
        run("right", ThreadOrder.ASCENDING, 0)


def test_a_write_into_the_rounding_after_an_array_is_seen() -> None:
    """Bytes between an array's end and the guard page are checked too."""
    short = poisoned(61)
    with pytest.raises(EmulationError, match="wrote past the end"):
        faulty().launch(Launch("right", (1, 1, 1), (64, 1, 1), 256, (short, INPUT)))


def test_arguments_are_checked() -> None:
    """A wrong name, number or type of arguments is refused before anything runs."""
    grid = (1, 1, 1)
    with pytest.raises(EmulationError, match="no kernel is called absent"):
        emulator().launch(Launch("absent", grid, grid, 0, ()))
    with pytest.raises(EmulationError, match="2 arguments, not 3"):
        emulator().launch(Launch("add_f32", grid, grid, 0, (INPUT, INPUT)))
    with pytest.raises(EmulationError, match="argument 2 is int32, the kernel's is 'l'"):
        emulator().launch(Launch("add_f32", grid, grid, 0, (INPUT, INPUT, np.int32(1))))


def test_a_guard_does_not_take_faults_that_are_not_its_own() -> None:
    """After a caught fault the process's own handling of signals is back."""
    import signal

    before = signal.getsignal(signal.SIGSEGV)
    with pytest.raises(EmulationError):
        run("reads_past_end", ThreadOrder.RANDOM)
    assert signal.getsignal(signal.SIGSEGV) == before
