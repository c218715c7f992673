// How stored weights become floats. Each format is a row of a matrix [num_rows, width] with
//   STEP      weights that one thread takes at a time (width is a multiple of it, or there is SCALAR, the same one by one)
//   load(k)   weights k .. k + STEP - 1, group scales applied
//   scale()   factor of the whole row, applied once to its sum
// and, where WORDS is not 0, the same in two halves, so that several loads are under way before the first is used:
//   fetch(k, words), decode(words, k, to), UNROLL of them at a time
#pragma once

#include "device.cuh"

// Elements of type T with no scale, or with a float32 scale for each row (SCALED).
template <class T, int STEP_, bool SCALED> struct PlainRow {
    static constexpr int STEP = STEP_;
    static constexpr int WORDS = STEP_ > 1 ? STEP_ * (int)sizeof(T) / 4 : 0;
    static constexpr int UNROLL = 4;
    static constexpr bool HAS_SCALAR = true;
    using SCALAR = PlainRow<T, 1, SCALED>;
    const T* elements;
    float row_scale;

    __device__ PlainRow(const void* weights, const void* scales, int row, int width, int)
        : elements(static_cast<const T*>(weights) + (size_t)row * width),
          row_scale(SCALED ? static_cast<const float*>(scales)[row] : 1.0f) {}
    __device__ void load(int k, float (&to)[STEP]) const { load_elements<T, STEP>(elements + k, to); }
    template <int N> __device__ void fetch(int k, unsigned (&words)[N]) const { load_words_once(elements + k, words); }
    template <int N> __device__ void decode(const unsigned (&words)[N], int, float (&to)[STEP]) const {
#pragma unroll
        for (int i = 0; i < STEP; i++) to[i] = to_float(element_of<T>(words, i));
    }
    __device__ float scale() const { return row_scale; }
};

// Byte j of a row holds weight 2j (low four bits) and 2j + 1; value (bits - 8) * scale of its group of `group_size`
// neighbouring weights. scales [num_rows, width / group_size] f16; group_size is a multiple of 32.
struct Int4Row {
    static constexpr int STEP = 32;
    static constexpr int WORDS = 4;
    static constexpr int UNROLL = 2;
    static constexpr bool HAS_SCALAR = false;
    const unsigned char* bytes;
    const f16* scales;
    int group_size;

    __device__ Int4Row(const void* weights, const void* all_scales, int row, int width, int group)
        : bytes(static_cast<const unsigned char*>(weights) + (size_t)row * (width / 2)),
          scales(static_cast<const f16*>(all_scales) + (size_t)row * (width / group)), group_size(group) {}
    __device__ void load(int k, float (&to)[STEP]) const {
        unsigned words[WORDS];
        load_words(bytes + k / 2, words);
        decode(words, k, to);
    }
    __device__ void fetch(int k, unsigned (&words)[WORDS]) const { load_words_once(bytes + k / 2, words); }
    __device__ void decode(const unsigned (&words)[WORDS], int k, float (&to)[STEP]) const {
        float scale = to_float(scales[k / group_size]);
#pragma unroll
        for (int i = 0; i < STEP; i++) to[i] = (float)((int)(words[i / 8] >> 4 * (i % 8) & 15u) - 8) * scale;
    }
    __device__ float scale() const { return 1.0f; }
};

// ---- GGUF blocks as they lie in the file. Source: ggml-common.h and ggml-quants.c of ggml ----

// Blocks of 34, 18 bytes are 2-aligned only: loads of two bytes, which the L1 cache joins.
template <int N> DEVICE void load_half_words(const unsigned char* from, unsigned short (&to)[N]) {
    check_aligned(from, 2);
#pragma unroll
    for (int i = 0; i < N; i++) to[i] = reinterpret_cast<const unsigned short*>(from)[i];
}

struct Q8_0Row {  // f16 scale, 32 int8
    static constexpr int STEP = 32;
    static constexpr int WORDS = 0;
    static constexpr int BLOCK_BYTES = 34;
    static constexpr bool HAS_SCALAR = false;
    const unsigned char* blocks;

    __device__ Q8_0Row(const void* weights, const void*, int row, int width, int)
        : blocks(static_cast<const unsigned char*>(weights) + (size_t)row * (width / STEP) * BLOCK_BYTES) {}
    __device__ void load(int k, float (&to)[STEP]) const {
        unsigned short pairs[17];
        load_half_words(blocks + (size_t)(k / STEP) * BLOCK_BYTES, pairs);
        float scale = to_float(f16{pairs[0]});
#pragma unroll
        for (int i = 0; i < STEP; i++) to[i] = to_float((int8)(pairs[1 + i / 2] >> 8 * (i % 2))) * scale;
    }
    __device__ float scale() const { return 1.0f; }
};

struct Q4_0Row {  // f16 scale; byte j holds weight j (low four bits) and j + 16, each minus 8
    static constexpr int STEP = 32;
    static constexpr int WORDS = 0;
    static constexpr int BLOCK_BYTES = 18;
    static constexpr bool HAS_SCALAR = false;
    const unsigned char* blocks;

    __device__ Q4_0Row(const void* weights, const void*, int row, int width, int)
        : blocks(static_cast<const unsigned char*>(weights) + (size_t)row * (width / STEP) * BLOCK_BYTES) {}
    __device__ void load(int k, float (&to)[STEP]) const {
        unsigned short pairs[9];
        load_half_words(blocks + (size_t)(k / STEP) * BLOCK_BYTES, pairs);
        float scale = to_float(f16{pairs[0]});
#pragma unroll
        for (int i = 0; i < 16; i++) {
            unsigned byte = pairs[1 + i / 2] >> 8 * (i % 2) & 0xffu;
            to[i] = (float)((int)(byte & 15u) - 8) * scale;
            to[i + 16] = (float)((int)(byte >> 4) - 8) * scale;
        }
    }
    __device__ float scale() const { return 1.0f; }
};

struct Q4_1Row {  // f16 scale and lowest value; byte j holds weight j (low four bits) and j + 16
    static constexpr int STEP = 32;
    static constexpr int WORDS = 0;
    static constexpr int BLOCK_BYTES = 20;
    static constexpr bool HAS_SCALAR = false;
    const unsigned char* blocks;

    __device__ Q4_1Row(const void* weights, const void*, int row, int width, int)
        : blocks(static_cast<const unsigned char*>(weights) + (size_t)row * (width / STEP) * BLOCK_BYTES) {}
    __device__ void load(int k, float (&to)[STEP]) const {
        const unsigned char* block = blocks + (size_t)(k / STEP) * BLOCK_BYTES;
        check_aligned(block, 4);
        const unsigned* words = reinterpret_cast<const unsigned*>(block);
        float scale = to_float(f16{(unsigned short)words[0]}), lowest = to_float(f16{(unsigned short)(words[0] >> 16)});
#pragma unroll
        for (int i = 0; i < 16; i++) {
            unsigned byte = words[1 + i / 4] >> 8 * (i % 4) & 0xffu;
            to[i] = (float)(byte & 15u) * scale + lowest;
            to[i + 16] = (float)(byte >> 4) * scale + lowest;
        }
    }
    __device__ float scale() const { return 1.0f; }
};

// 256 weights in 8 sub-blocks of 32: f16 d and dmin, 8 six-bit scales and minima in 12 bytes, 4-bit weights; two
// sub-blocks share 32 bytes (low and high four bits). value = d * scale * bits - dmin * minimum
struct Q4_KRow {
    static constexpr int STEP = 32;
    static constexpr int WORDS = 0;
    static constexpr int BLOCK_WEIGHTS = 256;
    static constexpr int BLOCK_BYTES = 144;
    static constexpr bool HAS_SCALAR = false;
    const unsigned char* blocks;

    __device__ Q4_KRow(const void* weights, const void*, int row, int width, int)
        : blocks(static_cast<const unsigned char*>(weights) + (size_t)row * (width / BLOCK_WEIGHTS) * BLOCK_BYTES) {}
    __device__ void load(int k, float (&to)[STEP]) const {
        const unsigned char* block = blocks + (size_t)(k / BLOCK_WEIGHTS) * BLOCK_BYTES;
        int sub_block = k % BLOCK_WEIGHTS / STEP;
        unsigned head[4], words[8];  // head: d and dmin, then the 12 bytes of scales
        load_words(block, head);
        load_words(block + 16 + sub_block / 2 * 32, words);
        int scale_bits, minimum_bits;
        unpack_scales(head, sub_block, scale_bits, minimum_bits);
        float factor = to_float(f16{(unsigned short)head[0]}) * (float)scale_bits;
        float offset = to_float(f16{(unsigned short)(head[0] >> 16)}) * (float)minimum_bits;
        int shift = sub_block % 2 * 4;
#pragma unroll
        for (int i = 0; i < STEP; i++) to[i] = (float)(words[i / 4] >> (8 * (i % 4) + shift) & 15u) * factor - offset;
    }
    __device__ float scale() const { return 1.0f; }

    // Bytes 0-3: scales 0-3, bytes 4-7: minima 0-3 (six low bits each); bytes 8-11: the four low bits of scales and
    // minima 4-7, whose two high bits are the high bits of bytes 0-7.
    static __device__ void unpack_scales(const unsigned (&head)[4], int sub_block, int& scale, int& minimum) {
        int shift = sub_block % 4 * 8;
        unsigned low = head[1] >> shift & 0xffu, middle = head[2] >> shift & 0xffu, high = head[3] >> shift & 0xffu;
        bool first = sub_block < 4;
        scale = (int)(first ? low & 63u : (high & 15u) | low >> 6 << 4);
        minimum = (int)(first ? middle & 63u : high >> 4 | middle >> 6 << 4);
    }
};

// 256 weights in two halves of four quarters of 32: 128 bytes of four low bits (two quarters of a half share 32 bytes), 64
// bytes of two high bits (all four quarters of a half share 32), an int8 scale for each 16 weights, f16 d.
// value = d * scale * (bits - 32). Blocks of 210 bytes are 2-aligned only.
struct Q6_KRow {
    static constexpr int STEP = 32;
    static constexpr int WORDS = 0;
    static constexpr int BLOCK_WEIGHTS = 256;
    static constexpr int BLOCK_BYTES = 210;
    static constexpr bool HAS_SCALAR = false;
    const unsigned char* blocks;

    __device__ Q6_KRow(const void* weights, const void*, int row, int width, int)
        : blocks(static_cast<const unsigned char*>(weights) + (size_t)row * (width / BLOCK_WEIGHTS) * BLOCK_BYTES) {}
    __device__ void load(int k, float (&to)[STEP]) const {
        const unsigned char* block = blocks + (size_t)(k / BLOCK_WEIGHTS) * BLOCK_BYTES;
        int half = k % BLOCK_WEIGHTS / 128, quarter = k % 128 / STEP;
        unsigned short low[16], high[16], scales[1], d[1];
        load_half_words(block + half * 64 + quarter % 2 * 32, low);
        load_half_words(block + 128 + half * 32, high);
        load_half_words(block + 192 + half * 8 + quarter * 2, scales);
        load_half_words(block + 208, d);
        float factors[2];
#pragma unroll
        for (int i = 0; i < 2; i++) factors[i] = to_float(f16{d[0]}) * to_float((int8)(scales[0] >> 8 * i));
        int low_shift = quarter / 2 * 4, high_shift = quarter * 2;
#pragma unroll
        for (int i = 0; i < STEP; i++) {
            unsigned bits = low[i / 2] >> (8 * (i % 2) + low_shift) & 15u;
            bits |= (high[i / 2] >> (8 * (i % 2) + high_shift) & 3u) << 4;
            to[i] = (float)((int)bits - 32) * factors[i / 16];
        }
    }
    __device__ float scale() const { return 1.0f; }
};

using F32Row = PlainRow<float, 4, false>;
using Bf16Row = PlainRow<bf16, 8, false>;
using F16Row = PlainRow<f16, 8, false>;
using Int8Row = PlainRow<int8, 16, true>;
using E4m3Row = PlainRow<e4m3, 16, true>;
