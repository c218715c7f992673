// Elementwise kernels and row moves. One thread handles VEC neighbouring elements where the width allows.
#include "device.cuh"

DEVICE long long flat_thread() { return (long long)blockIdx.x * blockDim.x + threadIdx.x; }

// out[r, i] = silu(source[r, i]) * source[r, width + i]
template <class A, int VEC> DEVICE void silu_mul(A* out, const A* source, int num_rows, int width) {
    long long index = flat_thread() * VEC;
    if (index >= (long long)num_rows * width) return;
    long long row = index / width;
    const A* gates = source + index + row * width;
    float gate[VEC], up[VEC];
    load_elements<A, VEC>(gates, gate);
    load_elements<A, VEC>(gates + width, up);
#pragma unroll
    for (int j = 0; j < VEC; j++)  // expf may be infinite: the quotient is then rightly 0
        store(out + index + j, gate[j] / (1.0f + expf(-gate[j])) * up[j]);
}

template <class A> DEVICE void add_to_residual(float* residual, const A* delta, long long count) {
    long long index = flat_thread();
    if (index < count) residual[index] += to_float(delta[index]);
}

template <class A> DEVICE void bias_add(A* rows, const void* bias, int bias_type, long long count, int width) {
    long long index = flat_thread();
    if (index < count) store(rows + index, to_float(rows[index]) + load_table(bias, bias_type, (int)(index % width)));
}

// Exact form: x * (1 + erf(x / sqrt 2)) / 2 (Hendrycks and Gimpel 2016, arXiv:1606.08415).
template <class A> DEVICE void gelu(A* rows, long long count) {
    long long index = flat_thread();
    if (index >= count) return;
    float value = to_float(rows[index]);
    store(rows + index, 0.5f * value * (1.0f + erff(value * 0.70710678118654752f)));
}

template <class A> DEVICE void narrow(A* out, const float* source, long long count) {
    long long index = flat_thread();
    if (index < count) store(out + index, source[index]);
}

template <class A> DEVICE void widen(float* out, const A* source, long long count) {
    long long index = flat_thread();
    if (index < count) out[index] = to_float(source[index]);
}

// out[s] = source[row_indices[s]]: the rows whose logits are wanted. One block a result row and 1024 columns.
template <class A> DEVICE void select_rows(A* out, const A* source, const int* row_indices, int width) {
    int column = blockIdx.y * blockDim.x + threadIdx.x;
    if (column < width)
        out[(size_t)blockIdx.x * width + column] = source[(size_t)row_indices[blockIdx.x] * width + column];
}

#define ELEMENTWISE_KERNELS(A)                                                                         \
    KERNEL(256) silu_mul_##A(A* out, const A* source, int num_rows, int width) {                       \
        silu_mul<A, 1>(out, source, num_rows, width);                                                  \
    }                                                                                                  \
    KERNEL(256) silu_mul_x4_##A(A* out, const A* source, int num_rows, int width) {                    \
        silu_mul<A, 4>(out, source, num_rows, width);                                                  \
    }                                                                                                  \
    KERNEL(256) add_##A(float* residual, const A* delta, long long count) {                            \
        add_to_residual<A>(residual, delta, count);                                                    \
    }                                                                                                  \
    KERNEL(256) bias_add_##A(A* rows, const void* bias, int bias_type, long long count, int width) {   \
        bias_add<A>(rows, bias, bias_type, count, width);                                              \
    }                                                                                                  \
    KERNEL(256) gelu_##A(A* rows, long long count) { gelu<A>(rows, count); }                           \
    KERNEL(256) narrow_##A(A* out, const float* source, long long count) { narrow<A>(out, source, count); } \
    KERNEL(256) widen_##A(float* out, const A* source, long long count) { widen<A>(out, source, count); }   \
    KERNEL(1024) select_rows_##A(A* out, const A* source, const int* row_indices, int width) {         \
        select_rows<A>(out, source, row_indices, width);                                               \
    }                                                                                                  \
    KERNEL_ENTRY(silu_mul_##A)                                                                         \
    KERNEL_ENTRY(silu_mul_x4_##A)                                                                      \
    KERNEL_ENTRY(add_##A)                                                                              \
    KERNEL_ENTRY(bias_add_##A)                                                                         \
    KERNEL_ENTRY(gelu_##A)                                                                             \
    KERNEL_ENTRY(narrow_##A)                                                                           \
    KERNEL_ENTRY(widen_##A)                                                                            \
    KERNEL_ENTRY(select_rows_##A)

ELEMENTWISE_KERNELS(f32)
ELEMENTWISE_KERNELS(bf16)
ELEMENTWISE_KERNELS(f16)

// out[s] = mean of rows first_rows[s] .. first_rows[s] + num_rows[s]. One thread a column.
KERNEL(256) mean_pool(float* out, const float* source, const int* first_rows, const int* num_rows, int width) {
    int column = blockIdx.y * blockDim.x + threadIdx.x;
    if (column >= width) return;
    const float* rows = source + (size_t)first_rows[blockIdx.x] * width + column;
    float sum = 0.0f;
    for (int row = 0; row < num_rows[blockIdx.x]; row++) sum += rows[(size_t)row * width];
    out[(size_t)blockIdx.x * width + column] = sum / num_rows[blockIdx.x];
}
KERNEL_ENTRY(mean_pool)

// Each row divided by its length, or by `lowest_length` where it is shorter. One block a row, in place.
KERNEL(256) l2_normalise(float* rows, int width, float lowest_length) {
    float* scratch = reinterpret_cast<float*>(SHARED_MEMORY);
    float* row = rows + (size_t)blockIdx.x * width;
    float squares = 0.0f;
    for (int i = threadIdx.x; i < width; i += blockDim.x) squares += row[i] * row[i];
    float length = fmaxf(sqrtf(block_sum(squares, scratch)), lowest_length);
    for (int i = threadIdx.x; i < width; i += blockDim.x) row[i] = row[i] / length;
}
KERNEL_ENTRY(l2_normalise)
