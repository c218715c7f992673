// Rotary position embedding (Su et al. 2021, arXiv:2104.09864, equation 34; half-split pairs) and the append of keys
// and values to the paged KV cache.
#include "device.cuh"

// table [num_rows][2][half]: cosines, then sines, of position * inverse_frequencies, times `scale`. Once a step: every
// layer and head reads it.
KERNEL(256) rope_table(float* table, const int* positions, const float* inverse_frequencies, int num_rows, int half,
                       float scale) {
    int index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= num_rows * half) return;
    int row = index / half, pair = index % half;
    float angle = (float)positions[row] * inverse_frequencies[pair];
    float* cosines = table + (size_t)row * 2 * half;
    cosines[pair] = cosf(angle) * scale;
    cosines[half + pair] = sinf(angle) * scale;
}
KERNEL_ENTRY(rope_table)

// Rotates, in place, num_heads heads of 2 * half elements from `column` on of each row. One thread a pair.
template <class A>
DEVICE void rope(A* rows, const float* table, int num_rows, int row_stride, int column, int num_heads, int half) {
    long long index = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= (long long)num_rows * num_heads * half) return;
    int pair = (int)(index % half), head = (int)(index / half % num_heads), row = (int)(index / half / num_heads);
    const float* cosines = table + (size_t)row * 2 * half;
    float cosine = cosines[pair], sine = cosines[half + pair];
    A* first = rows + (size_t)row * row_stride + column + head * 2 * half + pair;
    A* second = first + half;
    float x = to_float(*first), y = to_float(*second);
    store(first, x * cosine - y * sine);
    store(second, y * cosine + x * sine);
}

// Copies each row's keys and values of one layer to its KV slot (block * KV_BLOCK_TOKENS + offset in the block; below 0
// means a row of padding). One thread an element of a key, which also moves the value's element.
template <class A>
DEVICE void kv_append(A* kv_layer, const A* rows, const int* slots, long long block_stride, int num_rows,
                      int row_stride, int key_column, int value_column, int num_kv_heads, int head_dim) {
    int width = num_kv_heads * head_dim;
    long long index = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= (long long)num_rows * width) return;
    int row = (int)(index / width), element = (int)(index % width), slot = slots[row];
    if (slot < 0) return;
    int head = element / head_dim, dim = element % head_dim;
    A* keys = kv_layer + slot / KV_BLOCK_TOKENS * block_stride;
    size_t place = ((size_t)head * KV_BLOCK_TOKENS + slot % KV_BLOCK_TOKENS) * head_dim + dim;
    const A* source = rows + (size_t)row * row_stride;
    keys[place] = source[key_column + element];
    keys[(size_t)width * KV_BLOCK_TOKENS + place] = source[value_column + element];
}

#define ROTARY_KERNELS(A)                                                                                        \
    KERNEL(256) rope_##A(A* rows, const float* table, int num_rows, int row_stride, int column, int num_heads,   \
                         int half) {                                                                             \
        rope<A>(rows, table, num_rows, row_stride, column, num_heads, half);                                     \
    }                                                                                                            \
    KERNEL(256) kv_append_##A(A* kv_layer, const A* rows, const int* slots, long long block_stride, int num_rows, \
                              int row_stride, int key_column, int value_column, int num_kv_heads, int head_dim) { \
        kv_append<A>(kv_layer, rows, slots, block_stride, num_rows, row_stride, key_column, value_column,        \
                     num_kv_heads, head_dim);                                                                    \
    }                                                                                                            \
    KERNEL_ENTRY(rope_##A)                                                                                       \
    KERNEL_ENTRY(kv_append_##A)

ROTARY_KERNELS(f32)
ROTARY_KERNELS(bf16)
ROTARY_KERNELS(f16)
