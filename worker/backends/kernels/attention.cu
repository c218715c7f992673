// Attention over the paged KV cache. Layout of one layer in the pool, for each block: [2][kv heads][16 tokens][head_dim]
// of type A, blocks `block_stride` elements apart; block_tables [sequences, table_width] name them in order of position.
#include "device.cuh"

// Where the keys of one (layer, kv head) begin in a block, and how far behind them the values.
template <class A> struct KvHead {
    const A* keys;
    size_t values_behind;
    long long block_stride;
    const int* block_table;

    __device__ KvHead(const A* kv_layer, long long stride, const int* table, int head, int num_kv_heads, int head_dim)
        : keys(kv_layer + (size_t)head * KV_BLOCK_TOKENS * head_dim),
          values_behind((size_t)num_kv_heads * KV_BLOCK_TOKENS * head_dim), block_stride(stride), block_table(table) {}
    __device__ const A* block_keys(int block) const { return keys + block_table[block] * block_stride; }
};

// ---- decode: one query a sequence, the context split over blocks of the grid (Flash-Decoding) ----
// Source: online softmax, Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2023, flash-decoding.

constexpr int TOKEN_LANES = 8;    // lanes that share a token; a warp has four tokens in hand
constexpr int DECODE_ROUNDS = 2;  // times four tokens in flight; 4 rounds double the code

// What a lane knows of one head: highest score, sum of weights, its share of the weighted values.
template <int DIMS> struct RunningSoftmax {
    float highest, total, values[DIMS];
};

// VEC: elements of one load. A lane owns dims (chunk * TOKEN_LANES + lane) * VEC + i.
template <class A, int D> struct DecodeShape {
    static constexpr int DIMS = D / TOKEN_LANES;
    static constexpr int WIDEST = 16 / sizeof(A);
    static constexpr int VEC = DIMS % 8 == 0 && WIDEST >= 8 ? 8 : DIMS % 4 == 0 ? 4 : 2;
    static constexpr int CHUNKS = DIMS / VEC;
};

template <class A, int D, int DIMS> DEVICE void load_dims(const A* token, int lane, bool valid, float (&to)[DIMS]) {
    using S = DecodeShape<A, D>;
#pragma unroll
    for (int c = 0; c < S::CHUNKS; c++) {
        float part[S::VEC];
        if (valid)
            load_elements<A, S::VEC>(token + (c * TOKEN_LANES + lane) * S::VEC, part);
#pragma unroll
        for (int i = 0; i < S::VEC; i++) to[c * S::VEC + i] = valid ? part[i] : 0.0f;  // never 0 * what was not written
    }
}

// Takes ROUNDS * 4 tokens from position `first_token` on, whose keys begin at `keys`, into the states of HEADS query
// heads; tokens outside [first, end) are masked.
template <class A, int D, int HEADS, int ROUNDS>
DEVICE void attend_tokens(RunningSoftmax<D / TOKEN_LANES> (&states)[HEADS],
                          const float (&queries)[HEADS][D / TOKEN_LANES], const A* keys, size_t values_behind,
                          int first_token, int first, int end) {
    constexpr int DIMS = D / TOKEN_LANES;
    int lane = threadIdx.x % TOKEN_LANES, token_group = threadIdx.x % WARP_THREADS / TOKEN_LANES;
    float scores[ROUNDS][HEADS];
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
        int offset = r * (WARP_THREADS / TOKEN_LANES) + token_group;
        bool valid = first_token + offset >= first && first_token + offset < end;
        float key[DIMS];
        load_dims<A, D, DIMS>(keys + offset * D, lane, valid, key);
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            float score = 0.0f;
#pragma unroll
            for (int i = 0; i < DIMS; i++) score += queries[h][i] * key[i];
#pragma unroll
            for (int bits = TOKEN_LANES / 2; bits; bits >>= 1) score += __shfl_xor_sync(FULL_WARP, score, bits);
            scores[r][h] = valid ? score : 2.0f * LOWEST;  // below `highest` at its start: weight 0
        }
    }
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        float highest = states[h].highest;
#pragma unroll
        for (int r = 0; r < ROUNDS; r++) highest = fmaxf(highest, scores[r][h]);
        float factor = expf(states[h].highest - highest);
        states[h].highest = highest;
        states[h].total *= factor;
#pragma unroll
        for (int i = 0; i < DIMS; i++) states[h].values[i] *= factor;
#pragma unroll
        for (int r = 0; r < ROUNDS; r++) states[h].total += scores[r][h] = expf(scores[r][h] - highest);
    }
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
        int offset = r * (WARP_THREADS / TOKEN_LANES) + token_group;
        bool valid = first_token + offset >= first && first_token + offset < end;
        float value[DIMS];
        load_dims<A, D, DIMS>(keys + values_behind + offset * D, lane, valid, value);
#pragma unroll
        for (int h = 0; h < HEADS; h++)
#pragma unroll
            for (int i = 0; i < DIMS; i++) states[h].values[i] += scores[r][h] * value[i];
    }
}

// Partial result of (sequence, head, split): highest score and total in `statistics` [.., 2], weighted values not yet
// divided in `partial` [.., D]. Shared memory: HEADS * (D + 2) floats for each group of TOKEN_LANES lanes.
template <class A, int D, int HEADS>
DEVICE void write_partial(RunningSoftmax<D / TOKEN_LANES> (&states)[HEADS], float* partial, float* statistics,
                          int sequence, int first_head, int num_tile_heads, int num_heads) {
    using S = DecodeShape<A, D>;
    int lane = threadIdx.x % TOKEN_LANES, num_groups = blockDim.x / TOKEN_LANES;
    float* shared = reinterpret_cast<float*>(SHARED_MEMORY);
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        float* own = shared + (threadIdx.x / TOKEN_LANES * HEADS + h) * (D + 2);
#pragma unroll
        for (int i = 0; i < S::DIMS; i++)
            own[(i / S::VEC * TOKEN_LANES + lane) * S::VEC + i % S::VEC] = states[h].values[i];
        if (lane == 0) own[D] = states[h].highest, own[D + 1] = states[h].total;
    }
    __syncthreads();
    for (int index = threadIdx.x; index < num_tile_heads * D; index += blockDim.x) {
        int h = index / D, dim = index % D;
        float highest = LOWEST, total = 0.0f, value = 0.0f;
#pragma unroll 4
        for (int g = 0; g < num_groups; g++) highest = fmaxf(highest, shared[(g * HEADS + h) * (D + 2) + D]);
#pragma unroll 4
        for (int g = 0; g < num_groups; g++) {
            const float* state = shared + (g * HEADS + h) * (D + 2);
            float factor = expf(state[D] - highest);
            value += state[dim] * factor;
            total += state[D + 1] * factor;
        }
        size_t place = ((size_t)sequence * num_heads + first_head + h) * gridDim.y + blockIdx.y;
        partial[place * D + dim] = value;
        if (dim == 0) statistics[place * 2] = highest, statistics[place * 2 + 1] = total;
    }
}

// Grid (kv heads * tiles of HEADS query heads, splits, sequences). queries: row first_rows[s] of `row_stride` elements,
// heads from column 0. context_tokens[s] counts the keys, the query's own included; 0 is a row of padding.
template <class A, int D, int HEADS>
DEVICE void decode_attention(float* partial, float* statistics, const A* queries, const A* kv_layer,
                             const int* block_tables, const int* first_rows, const int* context_tokens,
                             long long block_stride, int row_stride, int table_width, int num_heads, int num_kv_heads,
                             int window_tokens, float scale) {
    using S = DecodeShape<A, D>;
    int group = num_heads / num_kv_heads, tiles = (group + HEADS - 1) / HEADS, sequence = blockIdx.z;
    int kv_head = blockIdx.x / tiles, tile_first = blockIdx.x % tiles * HEADS;
    int num_tile_heads = min(HEADS, group - tile_first), first_head = kv_head * group + tile_first;
    int lane = threadIdx.x % TOKEN_LANES, warp = threadIdx.x / WARP_THREADS, num_warps = blockDim.x / WARP_THREADS;
    float query[HEADS][S::DIMS];
    RunningSoftmax<S::DIMS> states[HEADS];
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        const A* row = queries + (size_t)first_rows[sequence] * row_stride + (first_head + h) * D;
        load_dims<A, D, S::DIMS>(row, lane, h < num_tile_heads, query[h]);
        states[h].highest = LOWEST, states[h].total = 0.0f;
#pragma unroll
        for (int i = 0; i < S::DIMS; i++) query[h][i] *= scale, states[h].values[i] = 0.0f;
    }
    int end = context_tokens[sequence], first = window_tokens > 0 ? max(0, end - window_tokens) : 0;
    int first_block = first / KV_BLOCK_TOKENS, num_blocks = (end + KV_BLOCK_TOKENS - 1) / KV_BLOCK_TOKENS - first_block;
    int share = (num_blocks + gridDim.y - 1) / gridDim.y, split_first = first_block + blockIdx.y * share;
    int split_end = min(split_first + share, first_block + num_blocks);
    KvHead<A> head(kv_layer, block_stride, block_tables + (size_t)sequence * table_width, kv_head, num_kv_heads, D);
    constexpr int TOKENS = DECODE_ROUNDS * (WARP_THREADS / TOKEN_LANES);
#pragma unroll 1
    for (int token = split_first * KV_BLOCK_TOKENS + warp * TOKENS; token < split_end * KV_BLOCK_TOKENS;
         token += num_warps * TOKENS)
        attend_tokens<A, D, HEADS, DECODE_ROUNDS>(
            states, query, head.block_keys(token / KV_BLOCK_TOKENS) + token % KV_BLOCK_TOKENS * D, head.values_behind,
            token, first, end);
    write_partial<A, D, HEADS>(states, partial, statistics, sequence, first_head, num_tile_heads, num_heads);
}

// out[row of sequence, head, dim] = the splits' partial results joined. Grid (heads, sequences), a thread a dim.
template <class A>
DEVICE void combine_splits(A* out, const float* partial, const float* statistics, const int* first_rows,
                           int num_splits, int num_heads, int head_dim) {
    int head = blockIdx.x, sequence = blockIdx.y;
    size_t place = ((size_t)sequence * num_heads + head) * num_splits;
    float highest = LOWEST;
    for (int s = 0; s < num_splits; s++) highest = fmaxf(highest, statistics[(place + s) * 2]);
    for (int dim = threadIdx.x; dim < head_dim; dim += blockDim.x) {
        float total = 0.0f, value = 0.0f;
        for (int s = 0; s < num_splits; s++) {
            float factor = expf(statistics[(place + s) * 2] - highest);
            total += statistics[(place + s) * 2 + 1] * factor;
            value += partial[(place + s) * head_dim + dim] * factor;
        }
        store(out + ((size_t)first_rows[sequence] * num_heads + head) * head_dim + dim,
              total > 0.0f ? value / total : 0.0f);
    }
}

// ---- any head_dim, any mix of prefill and decode: one warp a (row, head). Slow and plain ----

// sequence_of_row[r] below 0: a row of padding, whose result is 0. Positions count from 0.
template <class A>
DEVICE void row_attention(A* out, const A* queries, const A* kv_layer, const int* block_tables,
                          const int* sequence_of_row, const int* positions, long long block_stride, int num_rows,
                          int row_stride, int table_width, int num_heads, int num_kv_heads, int head_dim,
                          int window_tokens, float scale) {
    constexpr int MOST_DIMS = 256 / WARP_THREADS;
    int index = blockIdx.x * (blockDim.x / WARP_THREADS) + threadIdx.x / WARP_THREADS, lane = threadIdx.x % WARP_THREADS;
    if (index >= num_rows * num_heads) return;  // a whole warp
    int row = index / num_heads, head = index % num_heads, sequence = sequence_of_row[row];
    float query[MOST_DIMS], values[MOST_DIMS], highest = LOWEST, total = 0.0f;
#pragma unroll
    for (int i = 0; i < MOST_DIMS; i++) {
        int dim = i * WARP_THREADS + lane;
        query[i] = dim < head_dim ? to_float(queries[(size_t)row * row_stride + head * head_dim + dim]) * scale : 0.0f;
        values[i] = 0.0f;
    }
    int end = sequence < 0 ? 0 : positions[row] + 1, first = window_tokens > 0 ? max(0, end - window_tokens) : 0;
    KvHead<A> kv(kv_layer, block_stride, block_tables + (size_t)max(sequence, 0) * table_width,
                 head / (num_heads / num_kv_heads), num_kv_heads, head_dim);
#pragma unroll 1
    for (int token = first; token < end; token++) {
        const A* key = kv.block_keys(token / KV_BLOCK_TOKENS) + token % KV_BLOCK_TOKENS * head_dim;
        float score = 0.0f;
#pragma unroll
        for (int i = 0; i < MOST_DIMS; i++)
            if (i * WARP_THREADS + lane < head_dim) score += query[i] * to_float(key[i * WARP_THREADS + lane]);
        score = warp_sum(score);
        float higher = fmaxf(highest, score), factor = expf(highest - higher), weight = expf(score - higher);
        highest = higher;
        total = total * factor + weight;
#pragma unroll
        for (int i = 0; i < MOST_DIMS; i++)
            if (i * WARP_THREADS + lane < head_dim)
                values[i] = values[i] * factor + weight * to_float(key[kv.values_behind + i * WARP_THREADS + lane]);
    }
#pragma unroll
    for (int i = 0; i < MOST_DIMS; i++)
        if (i * WARP_THREADS + lane < head_dim)
            store(out + ((size_t)row * num_heads + head) * head_dim + i * WARP_THREADS + lane,
                  total > 0.0f ? values[i] / total : 0.0f);
}

#define DECODE_KERNEL(A, D, HEADS)                                                                                    \
    KERNEL(128) decode_attention_##A##_d##D##_h##HEADS(                                                               \
        float* partial, float* statistics, const A* queries, const A* kv_layer, const int* block_tables,              \
        const int* first_rows, const int* context_tokens, long long block_stride, int row_stride, int table_width,    \
        int num_heads, int num_kv_heads, int window_tokens, float scale) {                                            \
        decode_attention<A, D, HEADS>(partial, statistics, queries, kv_layer, block_tables, first_rows,               \
                                      context_tokens, block_stride, row_stride, table_width, num_heads, num_kv_heads, \
                                      window_tokens, scale);                                                          \
    }                                                                                                                 \
    KERNEL_ENTRY(decode_attention_##A##_d##D##_h##HEADS)


#define COMBINE_KERNEL(A)                                                                                            \
    KERNEL(128) combine_splits_##A(A* out, const float* partial, const float* statistics, const int* first_rows,     \
                                   int num_splits, int num_heads, int head_dim) {                                    \
        combine_splits<A>(out, partial, statistics, first_rows, num_splits, num_heads, head_dim);                    \
    }                                                                                                                \
    KERNEL_ENTRY(combine_splits_##A)

#define ROW_KERNEL(A)                                                                                                \
    KERNEL(128) row_attention_##A(A* out, const A* queries, const A* kv_layer, const int* block_tables,              \
                                  const int* sequence_of_row, const int* positions, long long block_stride,          \
                                  int num_rows, int row_stride, int table_width, int num_heads, int num_kv_heads,    \
                                  int head_dim, int window_tokens, float scale) {                                    \
        row_attention<A>(out, queries, kv_layer, block_tables, sequence_of_row, positions, block_stride, num_rows,   \
                         row_stride, table_width, num_heads, num_kv_heads, head_dim, window_tokens, scale);          \
    }                                                                                                                \
    KERNEL_ENTRY(row_attention_##A)

// The serving types; float32 models and other head sizes take row_attention. Several heads of a group share what is
// loaded: 4 heads of 64, 2 of 128 (4 would take 255 registers, two warps a scheduler). Models with heads of 80 and 96
// have no groups.
#define DECODE_KERNELS(A)    \
    COMBINE_KERNEL(A)        \
    DECODE_KERNEL(A, 64, 1)  \
    DECODE_KERNEL(A, 64, 4)  \
    DECODE_KERNEL(A, 80, 1)  \
    DECODE_KERNEL(A, 96, 1)  \
    DECODE_KERNEL(A, 128, 1) \
    DECODE_KERNEL(A, 128, 2)

ROW_KERNEL(f32)
ROW_KERNEL(bf16)
ROW_KERNEL(f16)
DECODE_KERNELS(bf16)
DECODE_KERNELS(f16)
