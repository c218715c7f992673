// Attention of chunks of prompts over the paged KV cache, on tensor cores: 64 queries of one head a block, keys and
// values of 32 tokens at a time in shared memory, online softmax. Layouts as in attention.cu.
// Source: Dao 2023, arXiv:2307.08691 (FlashAttention-2); fragment layout: PTX ISA, "mma.m16n8k16".
#include "device.cuh"

constexpr int PREFILL_QUERIES = 64;  // of a block: 16 of a warp
constexpr int PREFILL_KEYS = 32;
constexpr int ROW_PADDING = 8;  // elements between rows of shared memory, so that a column's loads meet no bank twice

// c [16, 8] += a [16, 16] * b [16, 8], spread over a warp. Lane l = 4 g + t holds
//   a[0] (row g, columns 2t, 2t + 1), a[1] (row g + 8), a[2], a[3] (the same, columns 8 more)
//   b0 (rows 2t, 2t + 1, column g), b1 (rows 8 more); c[0], c[1] (row g, columns 2t, 2t + 1), c[2], c[3] (row g + 8)
#ifdef CUDA_ON_CPU
template <class A> DEVICE void multiply_tiles(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    unsigned words[6] = {a[0], a[1], a[2], a[3], b0, b1};
    emulation::enter_collective(FULL_WARP, 7, words, sizeof words);
    auto element = [](unsigned lane, int word, int half) {
        unsigned held[6];
        memcpy(held, emulation::read_lane(lane), sizeof held);
        return to_float(element_of<A>(held + word, half));
    };
    int g = threadIdx.x % WARP_THREADS / 4, t = threadIdx.x % 4;
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 16; k++) {
            float left = element(g * 4 + k % 8 / 2, i / 2 + k / 8 * 2, k % 2);
            float right = element((t * 2 + i % 2) * 4 + k % 8 / 2, 4 + k / 8, k % 2);
            c[i] += left * right;
        }
    emulation::leave_collective();
}
#else
template <class A> DEVICE void multiply_tiles(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);
template <>
__device__ __forceinline__ void multiply_tiles<bf16>(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply_tiles<f16>(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

template <class A> DEVICE unsigned pack_pair(float low, float high) {
    A first, second;
    store(&first, low);
    store(&second, high);
    return first.bits | (unsigned)second.bits << 16;
}

template <class A> DEVICE unsigned load_pair(const A* from) {
    unsigned words[1];
    load_words(from, words);
    return words[0];
}

// Keys and values of tokens [base, base + PREFILL_KEYS) to shared memory; zeros outside [first, end).
template <class A, int D>
DEVICE void load_tile(A* keys, A* values, const A* head_keys, size_t values_behind, const int* block_table,
                      long long block_stride, int base, int first, int end) {
    constexpr int CHUNKS = D / 8;  // of 16 bytes
    for (int index = threadIdx.x; index < PREFILL_KEYS * CHUNKS; index += blockDim.x) {
        int token = base + index / CHUNKS, column = index % CHUNKS * 8;
        unsigned key[4] = {0, 0, 0, 0}, value[4] = {0, 0, 0, 0};
        if (token >= first && token < end) {
            const A* from = head_keys + block_table[token / KV_BLOCK_TOKENS] * block_stride +
                            token % KV_BLOCK_TOKENS * D + column;
            load_words(from, key);
            load_words(from + values_behind, value);
        }
        int place = index / CHUNKS * (D + ROW_PADDING) + column;
        *reinterpret_cast<uint4*>(keys + place) = uint4{key[0], key[1], key[2], key[3]};
        *reinterpret_cast<uint4*>(values + place) = uint4{value[0], value[1], value[2], value[3]};
    }
}

// What a thread has of its two query rows (g and g + 8 of the warp's 16).
template <int D> struct PrefillState {
    float result[D / 8][4];
    float highest[2], total[2];
};

// Scores of 16 queries against the tile, masked, and their share of the result.
template <class A, int D>
DEVICE void attend_tile(PrefillState<D>& state, const unsigned (&queries)[D / 16][4], const A* keys, const A* values,
                        int base, int first_position, int window_tokens, float scale) {
    int g = threadIdx.x % WARP_THREADS / 4, t = threadIdx.x % 4;
    float scores[PREFILL_KEYS / 8][4];
    float highest[2] = {state.highest[0], state.highest[1]};
#pragma unroll
    for (int n = 0; n < PREFILL_KEYS / 8; n++) {
        const A* row = keys + (n * 8 + g) * (D + ROW_PADDING) + t * 2;
        scores[n][0] = scores[n][1] = scores[n][2] = scores[n][3] = 0.0f;
#pragma unroll
        for (int k = 0; k < D / 16; k++)
            multiply_tiles<A>(scores[n], queries[k], load_pair(row + k * 16), load_pair(row + k * 16 + 8));
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int key = base + n * 8 + t * 2 + i % 2, position = first_position + g + i / 2 * 8;
            bool visible = key <= position && (window_tokens <= 0 || key > position - window_tokens);
            scores[n][i] = visible ? scores[n][i] * scale : 2.0f * LOWEST;  // below `highest` at its start: weight 0
            highest[i / 2] = fmaxf(highest[i / 2], scores[n][i]);
        }
    }
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {  // the four lanes of a row agree
        highest[r] = fmaxf(highest[r], __shfl_xor_sync(FULL_WARP, highest[r], 1));
        highest[r] = fmaxf(highest[r], __shfl_xor_sync(FULL_WARP, highest[r], 2));
        factor[r] = expf(state.highest[r] - highest[r]);
        state.highest[r] = highest[r];
        state.total[r] *= factor[r];
    }
#pragma unroll
    for (int n = 0; n < PREFILL_KEYS / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) state.total[i / 2] += scores[n][i] = expf(scores[n][i] - highest[i / 2]);
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) state.result[n][i] *= factor[i / 2];
#pragma unroll
        for (int k = 0; k < PREFILL_KEYS / 16; k++) {
            const float(&low)[4] = scores[2 * k];
            const float(&high)[4] = scores[2 * k + 1];
            unsigned weights[4] = {pack_pair<A>(low[0], low[1]), pack_pair<A>(low[2], low[3]),
                                   pack_pair<A>(high[0], high[1]), pack_pair<A>(high[2], high[3])};
            const A* column = values + (k * 16 + t * 2) * (D + ROW_PADDING) + n * 8 + g;
            constexpr int ROW = D + ROW_PADDING;
            multiply_tiles<A>(state.result[n], weights, column[0].bits | (unsigned)column[ROW].bits << 16,
                              column[8 * ROW].bits | (unsigned)column[9 * ROW].bits << 16);
        }
    }
}

// Grid (tiles, heads). tiles [.., 2]: a sequence and the first of its queries in the tile. Sequence s has num_rows[s]
// queries in rows first_rows[s] on, the last of which has context_tokens[s] keys, its own included.
template <class A, int D>
DEVICE void prefill_attention(A* out, const A* queries, const A* kv_layer, const int* block_tables, const int* tiles,
                              const int* first_rows, const int* num_rows, const int* context_tokens,
                              long long block_stride, int row_stride, int table_width, int num_heads,
                              int num_kv_heads, int window_tokens, float scale) {
    A* keys = reinterpret_cast<A*>(SHARED_MEMORY);
    A* values = keys + PREFILL_KEYS * (D + ROW_PADDING);
    int sequence = tiles[2 * blockIdx.x], tile_first = tiles[2 * blockIdx.x + 1], head = blockIdx.y;
    int start = context_tokens[sequence] - num_rows[sequence], rows_left = num_rows[sequence] - tile_first;
    int g = threadIdx.x % WARP_THREADS / 4, t = threadIdx.x % 4, warp_first = threadIdx.x / WARP_THREADS * 16;
    size_t first_row = (size_t)first_rows[sequence] + tile_first;
    unsigned fragments[D / 16][4];
#pragma unroll
    for (int k = 0; k < D / 16; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int query = warp_first + g + i % 2 * 8;
            const A* from = queries + (first_row + query) * row_stride + head * D + k * 16 + i / 2 * 8 + t * 2;
            fragments[k][i] = query < rows_left ? load_pair(from) : 0u;
        }
    PrefillState<D> state;
    state.highest[0] = state.highest[1] = LOWEST;
    state.total[0] = state.total[1] = 0.0f;
#pragma unroll
    for (int n = 0; n < D / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) state.result[n][i] = 0.0f;
    int end = start + tile_first + min(rows_left, PREFILL_QUERIES);
    int first = window_tokens > 0 ? max(0, start + tile_first + 1 - window_tokens) : 0;
    int kv_head = head / (num_heads / num_kv_heads);
    size_t values_behind = (size_t)num_kv_heads * KV_BLOCK_TOKENS * D;
#pragma unroll 1
    for (int base = first / PREFILL_KEYS * PREFILL_KEYS; base < end; base += PREFILL_KEYS) {
        __syncthreads();  // the tile before was used by all
        load_tile<A, D>(keys, values, kv_layer + (size_t)kv_head * KV_BLOCK_TOKENS * D, values_behind,
                        block_tables + (size_t)sequence * table_width, block_stride, base, first, end);
        __syncthreads();
        attend_tile<A, D>(state, fragments, keys, values, base, start + tile_first + warp_first, window_tokens, scale);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        state.total[r] += __shfl_xor_sync(FULL_WARP, state.total[r], 1);
        state.total[r] += __shfl_xor_sync(FULL_WARP, state.total[r], 2);
        int query = warp_first + g + r * 8;
        if (query >= rows_left) continue;
        A* to = out + ((first_row + query) * num_heads + head) * D + t * 2;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            store(to + n * 8, state.result[n][2 * r] / state.total[r]);
            store(to + n * 8 + 1, state.result[n][2 * r + 1] / state.total[r]);
        }
    }
}

#define PREFILL_KERNEL(A, D)                                                                                          \
    KERNEL(128) prefill_attention_##A##_d##D(                                                                         \
        A* out, const A* queries, const A* kv_layer, const int* block_tables, const int* tiles,                       \
        const int* first_rows, const int* num_rows, const int* context_tokens, long long block_stride,                \
        int row_stride, int table_width, int num_heads, int num_kv_heads, int window_tokens, float scale) {           \
        prefill_attention<A, D>(out, queries, kv_layer, block_tables, tiles, first_rows, num_rows, context_tokens,    \
                                block_stride, row_stride, table_width, num_heads, num_kv_heads, window_tokens, scale); \
    }                                                                                                                 \
    KERNEL_ENTRY(prefill_attention_##A##_d##D)

#define PREFILL_KERNELS(A) PREFILL_KERNEL(A, 64) PREFILL_KERNEL(A, 80) PREFILL_KERNEL(A, 96) PREFILL_KERNEL(A, 128)

PREFILL_KERNELS(bf16)
PREFILL_KERNELS(f16)
