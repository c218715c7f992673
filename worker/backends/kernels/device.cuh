// What all kernels share: element types, conversions, vector loads, reductions. No CUDA header is needed, so that NVRTC
// alone compiles it; with CUDA_ON_CPU defined the same source runs on the CPU (emulation/cuda_on_cpu.h).
#pragma once

#ifdef CUDA_ON_CPU
#include "emulation/cuda_on_cpu.h"
#define SHARED_MEMORY emulation::shared_memory
#else
extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];
#define SHARED_MEMORY dynamic_shared_memory  // the only shared memory; each launch description says how much
#define KERNEL_ENTRY(NAME)                   // the emulator's table of kernels
#define INFINITY __int_as_float(0x7f800000)
#endif

#define DEVICE static __device__ __forceinline__
#define KERNEL(THREADS) extern "C" __global__ void __launch_bounds__(THREADS, 1)
#define KERNEL_OF_MANY(THREADS, BLOCKS) extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)  // of a processor

constexpr unsigned FULL_WARP = 0xffffffffu;
constexpr int WARP_THREADS = 32;
constexpr int KV_BLOCK_TOKENS = 16;
constexpr float LOWEST = -1e30f;  // below any score, yet finite: LOWEST - LOWEST is 0, not NaN

// ---- element types ----

struct bf16 {
    unsigned short bits;
};
struct f16 {
    unsigned short bits;
};
using f32 = float;
using int8 = signed char;
struct e4m3 {
    unsigned char bits;
};

DEVICE float to_float(float value) { return value; }
DEVICE float to_float(bf16 value) { return __uint_as_float((unsigned)value.bits << 16); }
DEVICE float to_float(int8 value) { return (float)value; }

#ifdef CUDA_ON_CPU
DEVICE float to_float(f16 value) {
    _Float16 half;
    memcpy(&half, &value, 2);
    return (float)half;
}
DEVICE f16 round_to_f16(float value) {
    _Float16 half = (_Float16)value;
    f16 result;
    memcpy(&result, &half, 2);
    return result;
}
#else
DEVICE float to_float(f16 value) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
}
DEVICE f16 round_to_f16(float value) {
    f16 result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
}
#endif

// fp8 e4m3 (no infinity, NaN at 0x7f and 0xff): its bits, moved, are an f16 with an exponent that is 8 too small.
DEVICE float to_float(e4m3 value) {
    unsigned magnitude = value.bits & 0x7fu;
    f16 half = {(unsigned short)((value.bits & 0x80u) << 8 | magnitude << 7)};
    return magnitude == 0x7f ? __uint_as_float(0x7fc00000u) : to_float(half) * 256.0f;
}

DEVICE void store(float* to, float value) { *to = value; }
DEVICE void store(f16* to, float value) { *to = round_to_f16(value); }
DEVICE void store(bf16* to, float value) {  // to nearest, ties to even
    unsigned bits = __float_as_uint(value);
    unsigned rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    to->bits = (unsigned short)(value != value ? 0x7fc0u : rounded);
}

// Small tables (norm weights, biases) come in the type they are stored in; their type is an argument.
enum TableType { TABLE_F32 = 0, TABLE_BF16 = 1, TABLE_F16 = 2 };
DEVICE float load_table(const void* table, int type, int index) {
    if (type == TABLE_F32) return static_cast<const float*>(table)[index];
    unsigned short bits = static_cast<const unsigned short*>(table)[index];
    return type == TABLE_BF16 ? to_float(bf16{bits}) : to_float(f16{bits});
}

// ---- loads of several elements ----

DEVICE void check_aligned(const void* address, int num_bytes) {
#ifdef CUDA_ON_CPU
    if ((uintptr_t)address % (unsigned)num_bytes) emulation::fail("misaligned vector access");
#endif
}

// N words (4 bytes each; 1, 2 or a multiple of 4) in as few instructions as the address allows by contract.
template <int N> DEVICE void load_words(const void* from, unsigned (&words)[N]) {
    if constexpr (N == 1) {
        check_aligned(from, 4);
        words[0] = *static_cast<const unsigned*>(from);
    } else if constexpr (N == 2) {
        check_aligned(from, 8);
        uint2 pair = *static_cast<const uint2*>(from);
        words[0] = pair.x, words[1] = pair.y;
    } else {
        static_assert(N % 4 == 0, "1, 2 or a multiple of 4 words");
        check_aligned(from, 16);
#pragma unroll
        for (int i = 0; i < N / 4; i++) {
            uint4 four = static_cast<const uint4*>(from)[i];
            words[4 * i] = four.x, words[4 * i + 1] = four.y, words[4 * i + 2] = four.z, words[4 * i + 3] = four.w;
        }
    }
}

// N words (a multiple of 4) that nobody reads again soon: they take no place in the first cache. Not for what this launch
// writes.
template <int N> DEVICE void load_words_once(const void* from, unsigned (&words)[N]) {
#ifdef CUDA_ON_CPU
    load_words(from, words);
#else
#pragma unroll
    for (int i = 0; i < N; i += 4)
        asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
            : "=r"(words[i]), "=r"(words[i + 1]), "=r"(words[i + 2]), "=r"(words[i + 3])
            : "l"(static_cast<const uint4*>(from) + i / 4));
#endif
}

template <class T> DEVICE T element_of(const unsigned* words, int index);
template <> __device__ __forceinline__ float element_of<float>(const unsigned* words, int index) {
    return __uint_as_float(words[index]);
}
template <> __device__ __forceinline__ bf16 element_of<bf16>(const unsigned* words, int index) {
    return bf16{(unsigned short)(words[index / 2] >> 16 * (index % 2))};
}
template <> __device__ __forceinline__ f16 element_of<f16>(const unsigned* words, int index) {
    return f16{(unsigned short)(words[index / 2] >> 16 * (index % 2))};
}
template <> __device__ __forceinline__ int8 element_of<int8>(const unsigned* words, int index) {
    return (int8)(words[index / 4] >> 8 * (index % 4));
}
template <> __device__ __forceinline__ e4m3 element_of<e4m3>(const unsigned* words, int index) {
    return e4m3{(unsigned char)(words[index / 4] >> 8 * (index % 4))};
}

// N elements as floats. N > 1 needs an address that is a multiple of the loaded bytes (of 16 at most).
template <class T, int N> DEVICE void load_elements(const T* from, float (&to)[N]) {
    if constexpr (N == 1) {
        to[0] = to_float(*from);
    } else {
        unsigned words[N * sizeof(T) / 4];
        load_words(from, words);
#pragma unroll
        for (int i = 0; i < N; i++) to[i] = to_float(element_of<T>(words, i));
    }
}

// ---- reductions; every lane gets the result, in an order that does not depend on timing ----

DEVICE float warp_sum(float value) {
#pragma unroll
    for (int bits = 16; bits; bits >>= 1) value += __shfl_xor_sync(FULL_WARP, value, bits);
    return value;
}

DEVICE float warp_max(float value) {
#pragma unroll
    for (int bits = 16; bits; bits >>= 1) value = fmaxf(value, __shfl_xor_sync(FULL_WARP, value, bits));
    return value;
}

// Sum over the block; `scratch` [32] floats of shared memory. All threads must call it.
DEVICE float block_sum(float value, float* scratch) {
    int lane = threadIdx.x % WARP_THREADS, warp = threadIdx.x / WARP_THREADS;
    value = warp_sum(value);
    if (lane == 0) scratch[warp] = value;
    __syncthreads();
    float total = warp_sum(lane < (int)blockDim.x / WARP_THREADS ? scratch[lane] : 0.0f);
    __syncthreads();  // scratch may be used again
    return total;
}
