// Block-wide selection over a row of scores: best token, and the place in descending order where a sum is reached.
// All sums are of integers, so no result depends on the order in which threads arrive.
#pragma once

#include "device.cuh"

using uint64 = unsigned long long;

constexpr int SELECTION_THREADS = 1024;
constexpr int NUM_BINS = 256;
constexpr float WEIGHT_UNIT = 1099511627776.0f;  // 2^40: weights of at most 1 as integers; a row's sum stays below 2^62

// Shared memory of a selection; 16 bytes more than its arrays for the two results.
struct SelectionScratch {
    uint64 bins[NUM_BINS];
    uint64 warps[WARP_THREADS];
    uint64 key, before;
};

// Floats in the order of their values, as unsigned integers.
DEVICE unsigned ordered_bits(float value) {
    unsigned bits = __float_as_uint(value);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

DEVICE uint64 weight_units(float weight) { return (uint64)(weight * WEIGHT_UNIT); }

DEVICE uint64 block_sum_integers(uint64 value, SelectionScratch& scratch) {
    int lane = threadIdx.x % WARP_THREADS, warp = threadIdx.x / WARP_THREADS;
#pragma unroll
    for (int bits = 16; bits; bits >>= 1) value += __shfl_xor_sync(FULL_WARP, value, bits);
    if (lane == 0) scratch.warps[warp] = value;
    __syncthreads();
    uint64 total = lane < (int)blockDim.x / WARP_THREADS ? scratch.warps[lane] : 0;
#pragma unroll
    for (int bits = 16; bits; bits >>= 1) total += __shfl_xor_sync(FULL_WARP, total, bits);
    __syncthreads();
    return total;
}

DEVICE uint64 block_max_integers(uint64 value, SelectionScratch& scratch) {
    int lane = threadIdx.x % WARP_THREADS, warp = threadIdx.x / WARP_THREADS;
#pragma unroll
    for (int bits = 16; bits; bits >>= 1) {
        uint64 other = __shfl_xor_sync(FULL_WARP, value, bits);
        value = other > value ? other : value;
    }
    if (lane == 0) scratch.warps[warp] = value;
    __syncthreads();
    uint64 highest = lane < (int)blockDim.x / WARP_THREADS ? scratch.warps[lane] : 0;
#pragma unroll
    for (int bits = 16; bits; bits >>= 1) {
        uint64 other = __shfl_xor_sync(FULL_WARP, highest, bits);
        highest = other > highest ? other : highest;
    }
    __syncthreads();
    return highest;
}

// Value and index as one integer: the highest value, and the lowest index among equals, is the largest. A NaN is larger
// than every number, so that it is found.
DEVICE uint64 rank_of(float value, int index) {
    unsigned bits = value != value ? 0xffffffffu : ordered_bits(value);
    return (uint64)bits << 32 | (0xffffffffu - (unsigned)index);
}
DEVICE int index_of_rank(uint64 rank) { return (int)(0xffffffffu - (unsigned)rank); }

// In descending order of key, sums grow by `amount`s; the first key whose sum exceeds `target` (below the whole sum).
struct Position {
    unsigned key;
    uint64 before;  // sum of what has a higher key
};

// BY_WEIGHT: scores are weights (0 or more), the key their bits, the amount weight_units; otherwise the key is
// ordered_bits and each counts 1. Four passes of eight bits. All threads must call it.
template <bool BY_WEIGHT>
DEVICE Position descend(const float* scores, int count, uint64 target, SelectionScratch& scratch) {
    unsigned key = 0;
    uint64 before = 0;
#pragma unroll 1
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = threadIdx.x; i < NUM_BINS; i += blockDim.x) scratch.bins[i] = 0;
        __syncthreads();
        int held_bin = 0;  // neighbours often share a bin: one atomic for a run of them
        uint64 held = 0;
        for (int i = threadIdx.x; i < count; i += blockDim.x) {
            unsigned bits = BY_WEIGHT ? __float_as_uint(scores[i]) : ordered_bits(scores[i]);
            uint64 amount = BY_WEIGHT ? weight_units(scores[i]) : 1;
            if (amount == 0 || ((uint64)(bits ^ key) >> (shift + 8)) != 0) continue;
            int bin = bits >> shift & 255u;
            if (bin != held_bin && held) {
                atomicAdd(&scratch.bins[held_bin], held);
                held = 0;
            }
            held_bin = bin;
            held += amount;
        }
        if (held) atomicAdd(&scratch.bins[held_bin], held);
        __syncthreads();
        if (threadIdx.x < WARP_THREADS) {  // lane l has the bins 255 - 8 l and below
            int lane = threadIdx.x, top = NUM_BINS - 1 - 8 * lane;
            uint64 own = 0;
            for (int i = 0; i < 8; i++) own += scratch.bins[top - i];
            uint64 through = own;  // sum through this lane's bins
            for (int distance = 1; distance < WARP_THREADS; distance *= 2) {
                uint64 lower = __shfl_up_sync(FULL_WARP, through, distance);
                if (lane >= distance) through += lower;
            }
            unsigned reached = __ballot_sync(FULL_WARP, before + through > target);
            if (reached && lane == __popc((reached & (0u - reached)) - 1u)) {
                uint64 sum = before + through - own;
                int bin = top;
                while (sum + scratch.bins[bin] <= target) sum += scratch.bins[bin--];
                scratch.key = key | (unsigned)bin << shift;
                scratch.before = sum;
            }
        }
        __syncthreads();
        key = (unsigned)scratch.key;
        before = scratch.before;
    }
    return {key, before};
}

// Calls visit(i) for every i in index order whose predicate holds, 32 at a time by warp 0: for ties, which are rare.
// visit gets the index and how many came before; it returns nothing.
template <class Predicate, class Visit> DEVICE void walk_in_order(int count, const Predicate& holds, const Visit& visit) {
    if (threadIdx.x >= WARP_THREADS) return;
    unsigned num_before = 0;
    for (int base = 0; base < count; base += WARP_THREADS) {
        int index = base + threadIdx.x;
        bool found = index < count && holds(index);
        unsigned lanes = __ballot_sync(FULL_WARP, found);
        if (found) visit(index, num_before + __popc(lanes & ((1u << threadIdx.x) - 1u)));
        num_before += __popc(lanes);
    }
}
