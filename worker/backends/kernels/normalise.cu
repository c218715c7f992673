// RMS norm (Zhang and Sennrich 2019, arXiv:1910.07467), alone, after a residual add, and over heads; layer norm.
// The residual stream is float32; what feeds a matrix product has the activation type A.
#include "device.cuh"

// VEC elements a thread at a time; the row's sum of squares (or of elements) over the block.
template <class A, int VEC, bool ADDS>
DEVICE void rms_norm_row(A* out, float* residual, const A* delta, const void* weight, int weight_type, int width,
                         float epsilon) {
    float* scratch = reinterpret_cast<float*>(SHARED_MEMORY);
    float squares = 0.0f;
#pragma unroll 1
    for (int i = threadIdx.x * VEC; i < width; i += blockDim.x * VEC) {
        float value[VEC];
        load_elements<float, VEC>(residual + i, value);
        if constexpr (ADDS) {
            float added[VEC];
            load_elements<A, VEC>(delta + i, added);
#pragma unroll
            for (int j = 0; j < VEC; j++) residual[i + j] = value[j] += added[j];
        }
#pragma unroll
        for (int j = 0; j < VEC; j++) squares += value[j] * value[j];
    }
    float factor = rsqrtf(block_sum(squares, scratch) / width + epsilon);
#pragma unroll 1
    for (int i = threadIdx.x * VEC; i < width; i += blockDim.x * VEC) {  // the same elements, by the same thread
        float value[VEC];
        load_elements<float, VEC>(residual + i, value);
#pragma unroll
        for (int j = 0; j < VEC; j++) store(out + i + j, value[j] * factor * load_table(weight, weight_type, i + j));
    }
}

// One block a row. residual [rows, width] float32; delta is added to it first where ADDS.
template <class A, bool ADDS>
DEVICE void rms_norm(A* out, float* residual, const A* delta, const void* weight, int weight_type, int width,
                     float epsilon) {
    size_t row = (size_t)blockIdx.x * width;
    if (width % 4 == 0)
        rms_norm_row<A, 4, ADDS>(out + row, residual + row, delta + row, weight, weight_type, width, epsilon);
    else
        rms_norm_row<A, 1, ADDS>(out + row, residual + row, delta + row, weight, weight_type, width, epsilon);
}

// One warp a head: heads [num_rows][num_heads] of head_dim elements, from `column` on of rows `row_stride` wide.
template <class A>
DEVICE void head_rms_norm(A* rows, const void* weight, int weight_type, int num_rows, int row_stride, int column,
                          int num_heads, int head_dim, float epsilon) {
    int head = blockIdx.x * (blockDim.x / WARP_THREADS) + threadIdx.x / WARP_THREADS;
    int lane = threadIdx.x % WARP_THREADS;
    if (head >= num_rows * num_heads) return;  // a whole warp
    A* elements = rows + (size_t)(head / num_heads) * row_stride + column + head % num_heads * head_dim;
    float squares = 0.0f;
#pragma unroll 1
    for (int i = lane; i < head_dim; i += WARP_THREADS) {
        float value = to_float(elements[i]);
        squares += value * value;
    }
    float factor = rsqrtf(warp_sum(squares) / head_dim + epsilon);
#pragma unroll 1
    for (int i = lane; i < head_dim; i += WARP_THREADS)
        store(elements + i, to_float(elements[i]) * factor * load_table(weight, weight_type, i));
}

// One block a row, float32 in. The variance is taken around the mean, in a second pass.
template <class A>
DEVICE void layer_norm(A* out, const float* source, const void* weight, const void* bias, int table_type, int width,
                       float epsilon) {
    float* scratch = reinterpret_cast<float*>(SHARED_MEMORY);
    const float* row = source + (size_t)blockIdx.x * width;
    float sum = 0.0f, squares = 0.0f;
#pragma unroll 1
    for (int i = threadIdx.x; i < width; i += blockDim.x) sum += row[i];
    float mean = block_sum(sum, scratch) / width;
#pragma unroll 1
    for (int i = threadIdx.x; i < width; i += blockDim.x) squares += (row[i] - mean) * (row[i] - mean);
    float factor = rsqrtf(block_sum(squares, scratch) / width + epsilon);
#pragma unroll 1
    for (int i = threadIdx.x; i < width; i += blockDim.x)
        store(out + (size_t)blockIdx.x * width + i,
              (row[i] - mean) * factor * load_table(weight, table_type, i) + load_table(bias, table_type, i));
}

#define NORMALISE_KERNELS(A)                                                                                         \
    KERNEL(512) rms_norm_##A(A* out, float* source, const void* weight, int weight_type, int width, float epsilon) { \
        rms_norm<A, false>(out, source, out, weight, weight_type, width, epsilon);                                   \
    }                                                                                                                \
    KERNEL(512) add_rms_norm_##A(A* out, float* residual, const A* delta, const void* weight, int weight_type,       \
                                 int width, float epsilon) {                                                         \
        rms_norm<A, true>(out, residual, delta, weight, weight_type, width, epsilon);                                \
    }                                                                                                                \
    KERNEL(128) head_rms_norm_##A(A* rows, const void* weight, int weight_type, int num_rows, int row_stride,        \
                                  int column, int num_heads, int head_dim, float epsilon) {                          \
        head_rms_norm<A>(rows, weight, weight_type, num_rows, row_stride, column, num_heads, head_dim, epsilon);     \
    }                                                                                                                \
    KERNEL(512) layer_norm_##A(A* out, const float* source, const void* weight, const void* bias, int table_type,    \
                               int width, float epsilon) {                                                           \
        layer_norm<A>(out, source, weight, bias, table_type, width, epsilon);                                        \
    }                                                                                                                \
    KERNEL_ENTRY(rms_norm_##A)                                                                                       \
    KERNEL_ENTRY(add_rms_norm_##A)                                                                                   \
    KERNEL_ENTRY(head_rms_norm_##A)                                                                                  \
    KERNEL_ENTRY(layer_norm_##A)

NORMALISE_KERNELS(f32)
NORMALISE_KERNELS(bf16)
NORMALISE_KERNELS(f16)
