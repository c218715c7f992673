// out = x @ weights.T for few rows of x (decode), with weights used as they are stored: memory-bound, so each weight is
// read once for up to BATCH rows. One warp an output; lanes stride over the width.
#include "weights.cuh"

enum OutputMode { OUT_ACTIVATION = 0, OUT_F32 = 1, OUT_ADD_F32 = 2 };

template <class ROW, class A, int BATCH>
DEVICE void accumulate(float (&sums)[BATCH], const ROW& row, const A* const (&inputs)[BATCH], int width) {
    constexpr int STEP = ROW::STEP;
    constexpr int CHUNK = STEP < 8 ? STEP : 8;  // elements of x in registers at a time
#pragma unroll 1  // the chunks below are parallel enough; unrolled further, the kernels would be three times as large
    for (int k = threadIdx.x % WARP_THREADS * STEP; k < width; k += WARP_THREADS * STEP) {
        float weights[STEP];
        row.load(k, weights);
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
#pragma unroll
            for (int c = 0; c < STEP; c += CHUNK) {
                float x[CHUNK];
                load_elements<A, CHUNK>(inputs[b] + k + c, x);
#pragma unroll
                for (int i = 0; i < CHUNK; i++) sums[b] += weights[c + i] * x[i];
            }
        }
    }
}

// The same for one row of x: UNROLL loads of weights are under way before the first is used, because bytes under way are
// what one row's bandwidth depends on. Each has a sum of its own.
template <class ROW, class A> DEVICE float accumulate_row(const ROW& row, const A* x, int width) {
    constexpr int STEP = ROW::STEP, UNROLL = ROW::UNROLL, STRIDE = WARP_THREADS * STEP;
    constexpr int CHUNK = STEP < 8 ? STEP : 8;
    float sums[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) sums[u] = 0.0f;
#pragma unroll 1
    for (int k = threadIdx.x % WARP_THREADS * STEP; k < width; k += UNROLL * STRIDE) {
        unsigned words[UNROLL][ROW::WORDS];
#pragma unroll
        for (int u = 0; u < UNROLL; u++)
            if (k + u * STRIDE < width) row.fetch(k + u * STRIDE, words[u]);
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            if (k + u * STRIDE >= width) break;
            float weights[STEP];
            row.decode(words[u], k + u * STRIDE, weights);
#pragma unroll
            for (int c = 0; c < STEP; c += CHUNK) {
                float elements[CHUNK];
                load_elements<A, CHUNK>(x + k + u * STRIDE + c, elements);
#pragma unroll
                for (int i = 0; i < CHUNK; i++) sums[u] += weights[c + i] * elements[i];
            }
        }
    }
    float sum = 0.0f;
#pragma unroll
    for (int u = 0; u < UNROLL; u++) sum += sums[u];
    return sum;
}

template <class ROW, class A, int BATCH>
DEVICE void accumulate_rows(float (&sums)[BATCH], const ROW& row, const A* const (&inputs)[BATCH], int width) {
    if constexpr (BATCH == 1 && ROW::WORDS > 0)
        sums[0] = accumulate_row<ROW, A>(row, inputs[0], width);
    else
        accumulate<ROW, A, BATCH>(sums, row, inputs, width);
}

// x [num_rows, width] of A; grid (outputs / warps of a block, ceil(num_rows / BATCH)). bias may be null.
template <class ROW, class A, int BATCH>
DEVICE void gemv(void* out, const A* x, const void* weights, const void* scales, const void* bias, int bias_type,
                 int num_rows, int num_outputs, int width, int group_size, int mode) {
    int output = blockIdx.x * (blockDim.x / WARP_THREADS) + threadIdx.x / WARP_THREADS;
    int first_row = blockIdx.y * BATCH;
    if (output >= num_outputs) return;  // a whole warp
    const A* inputs[BATCH];
    float sums[BATCH];
#pragma unroll
    for (int b = 0; b < BATCH; b++) {  // rows past the last repeat it and are not stored
        inputs[b] = x + (size_t)min(first_row + b, num_rows - 1) * width;
        sums[b] = 0.0f;
    }
    ROW row(weights, scales, output, width, group_size);
    if constexpr (!ROW::HAS_SCALAR) {
        accumulate_rows<ROW, A, BATCH>(sums, row, inputs, width);
    } else if (width % ROW::STEP == 0) {
        accumulate_rows<ROW, A, BATCH>(sums, row, inputs, width);
    } else {
        typename ROW::SCALAR scalar(weights, scales, output, width, group_size);
        accumulate<typename ROW::SCALAR, A, BATCH>(sums, scalar, inputs, width);
    }
    float added = bias ? load_table(bias, bias_type, output) : 0.0f;
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
        float value = warp_sum(sums[b]) * row.scale() + added;
        if (threadIdx.x % WARP_THREADS != 0 || first_row + b >= num_rows) continue;
        size_t place = (size_t)(first_row + b) * num_outputs + output;
        if (mode == OUT_ACTIVATION) store(static_cast<A*>(out) + place, value);
        else if (mode == OUT_F32) static_cast<float*>(out)[place] = value;
        else static_cast<float*>(out)[place] += value;
    }
}

template <class ROW, class A> DEVICE void copy_row(A* to, const ROW& row, int width) {
#pragma unroll 1
    for (int k = threadIdx.x * ROW::STEP; k < width; k += blockDim.x * ROW::STEP) {
        float values[ROW::STEP];
        row.load(k, values);
#pragma unroll
        for (int i = 0; i < ROW::STEP; i++) store(to + k + i, values[i] * row.scale());
    }
}

// out[i] = row row_indices[i] of a stored matrix, or row i where row_indices is null: embedding, and the way of
// quantised weights to a matrix product that wants type A. Indices outside are clipped. One block a row.
template <class ROW, class A>
DEVICE void gather_rows(A* out, const void* table, const void* scales, const int* row_indices, int num_table_rows,
                        int width, int group_size) {
    int index = row_indices ? min(max(row_indices[blockIdx.x], 0), num_table_rows - 1) : blockIdx.x;
    A* to = out + (size_t)blockIdx.x * width;
    if constexpr (!ROW::HAS_SCALAR)
        copy_row(to, ROW(table, scales, index, width, group_size), width);
    else if (width % ROW::STEP == 0)
        copy_row(to, ROW(table, scales, index, width, group_size), width);
    else
        copy_row(to, typename ROW::SCALAR(table, scales, index, width, group_size), width);
}

// One row of x: eight blocks of a processor, so that 4096 outputs are one wave on 132 of them.
#define GEMV_KERNEL(FORMAT, ROW, A, BATCH)                                                                         \
    KERNEL_OF_MANY(128, (BATCH == 1 ? 8 : 1))                                                                      \
    gemv_##FORMAT##_##A##_x##BATCH(void* out, const A* x, const void* weights, const void* scales,                 \
                                   const void* bias, int bias_type, int num_rows, int num_outputs, int width,      \
                                   int group_size, int mode) {                                                     \
        gemv<ROW, A, BATCH>(out, x, weights, scales, bias, bias_type, num_rows, num_outputs, width, group_size,    \
                            mode);                                                                                 \
    }                                                                                                              \
    KERNEL_ENTRY(gemv_##FORMAT##_##A##_x##BATCH)

#define GATHER_KERNEL(FORMAT, ROW, A)                                                                              \
    KERNEL(256) gather_rows_##FORMAT##_##A(A* out, const void* table, const void* scales, const int* row_indices,  \
                                           int num_table_rows, int width, int group_size) {                        \
        gather_rows<ROW, A>(out, table, scales, row_indices, num_table_rows, width, group_size);                   \
    }                                                                                                              \
    KERNEL_ENTRY(gather_rows_##FORMAT##_##A)

#define GEMV_KERNELS(FORMAT, ROW, A) \
    GEMV_KERNEL(FORMAT, ROW, A, 1)   \
    GEMV_KERNEL(FORMAT, ROW, A, 4)

// Quantised formats feed bfloat16 activations, or float32 ones where exactness is wanted (row by row).
#define QUANTISED_KERNELS(FORMAT, ROW) \
    GEMV_KERNELS(FORMAT, ROW, bf16)    \
    GEMV_KERNEL(FORMAT, ROW, f32, 1)   \
    GATHER_KERNEL(FORMAT, ROW, bf16)   \
    GATHER_KERNEL(FORMAT, ROW, f32)

GEMV_KERNELS(f32, F32Row, f32)
GEMV_KERNELS(bf16, Bf16Row, bf16)
GEMV_KERNELS(f16, F16Row, f16)
GATHER_KERNEL(f32, F32Row, f32)
GATHER_KERNEL(bf16, Bf16Row, f32)
GATHER_KERNEL(f16, F16Row, f32)
QUANTISED_KERNELS(int8, Int8Row)
QUANTISED_KERNELS(e4m3, E4m3Row)
QUANTISED_KERNELS(int4, Int4Row)
QUANTISED_KERNELS(q8_0, Q8_0Row)
QUANTISED_KERNELS(q4_0, Q4_0Row)
QUANTISED_KERNELS(q4_1, Q4_1Row)
QUANTISED_KERNELS(q4_k, Q4_KRow)
QUANTISED_KERNELS(q6_k, Q6_KRow)
