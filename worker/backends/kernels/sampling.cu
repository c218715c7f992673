// Choice of the next token on the device, by the rule of worker/backends/host_sampling.py: penalties, bias, mask,
// temperature, top-k, top-p, min-p, then inverse CDF with a given uniform number. One block a row.
#include "selection.cuh"

// One row's parameters; mirrored by SAMPLING_ROW in worker/backends/cuda_kernels.py.
struct SamplingRow {
    double uniform, top_p;
    float temperature, min_p, repetition_penalty, frequency_penalty, presence_penalty;
    int logits_row, top_k, mask_row;  // mask_row below 0: every token is allowed
    int seen_begin, seen_end, counted_begin, counted_end, bias_begin, bias_end;  // ranges of `ids` (and `values`)
};

// Penalties, bias and mask. Ids of a range are distinct. Source of the first: Keskar et al. 2019, arXiv:1909.05858.
DEVICE void adjust_scores(float* scores, const float* logits, const SamplingRow& row, const int* ids,
                          const float* values, const unsigned* masks, int vocab_size) {
    for (int i = threadIdx.x; i < vocab_size; i += blockDim.x) scores[i] = logits[i];
    __syncthreads();
    for (int j = row.seen_begin + threadIdx.x; j < row.seen_end; j += blockDim.x) {
        float score = scores[ids[j]];
        scores[ids[j]] = score > 0.0f ? score / row.repetition_penalty : score * row.repetition_penalty;
    }
    __syncthreads();
    for (int j = row.counted_begin + threadIdx.x; j < row.counted_end; j += blockDim.x)
        scores[ids[j]] -= row.frequency_penalty * values[j] + row.presence_penalty;
    __syncthreads();
    for (int j = row.bias_begin + threadIdx.x; j < row.bias_end; j += blockDim.x) scores[ids[j]] += values[j];
    __syncthreads();
    if (row.mask_row >= 0) {
        const unsigned* mask = masks + (size_t)row.mask_row * ((vocab_size + 31) / 32);
        for (int i = threadIdx.x; i < vocab_size; i += blockDim.x)
            if (!(mask[i / 32] >> i % 32 & 1u)) scores[i] = -INFINITY;
        __syncthreads();
    }
}

DEVICE uint64 best_rank(const float* scores, int count, SelectionScratch& scratch) {
    uint64 best = 0;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        uint64 rank = rank_of(scores[i], i);
        best = rank > best ? rank : best;
    }
    return block_max_integers(best, scratch);
}

// Scores that are not among the k largest become -infinity; of equals at the edge the lowest ids stay.
DEVICE void keep_largest(float* scores, int vocab_size, int k, SelectionScratch& scratch) {
    Position edge = descend<false>(scores, vocab_size, (uint64)k - 1, scratch);
    unsigned num_ties = (unsigned)(k - (int)edge.before);  // that stay
    walk_in_order(vocab_size, [=](int i) { return ordered_bits(scores[i]) == edge.key; },
                  [=](int i, unsigned before) {
                      if (before >= num_ties) scores[i] = -INFINITY;
                  });
    __syncthreads();
    for (int i = threadIdx.x; i < vocab_size; i += blockDim.x)
        if (ordered_bits(scores[i]) < edge.key) scores[i] = -INFINITY;
    __syncthreads();
}

// The sum of what top-p and min-p leave, in weight units, where candidates are taken in descending order of weight.
DEVICE uint64 kept_sum(const float* weights, int vocab_size, const SamplingRow& row, uint64 total,
                       SelectionScratch& scratch) {
    uint64 goal = (uint64)ceil(row.top_p * (double)total);
    goal = goal < 1 ? 1 : goal > total ? total : goal;
    Position edge = descend<true>(weights, vocab_size, goal - 1, scratch);
    float edge_weight = __uint_as_float(edge.key);
    uint64 units = weight_units(edge_weight), num_ties = (goal - edge.before + units - 1) / units;
    if (edge_weight >= row.min_p) return edge.before + num_ties * units;
    uint64 above = 0;  // min-p is the narrower one
    for (int i = threadIdx.x; i < vocab_size; i += blockDim.x)
        if (weights[i] >= row.min_p) above += weight_units(weights[i]);
    return block_sum_integers(above, scratch);
}

// Inverse CDF in descending order of weight, equals by id.
DEVICE void draw_descending(int* token, const float* weights, int vocab_size, uint64 target, SelectionScratch& scratch) {
    Position place = descend<true>(weights, vocab_size, target, scratch);
    unsigned wanted = (unsigned)((target - place.before) / weight_units(__uint_as_float(place.key)));
    walk_in_order(vocab_size, [=](int i) { return __float_as_uint(weights[i]) == place.key; },
                  [=](int i, unsigned before) {
                      if (before == wanted) *token = i;
                  });
}

// Inverse CDF in order of id: each warp sums a stretch of ids, then the warp whose stretch holds the target walks it.
DEVICE void draw_by_id(int* token, const float* weights, int vocab_size, uint64 target, SelectionScratch& scratch) {
    int lane = threadIdx.x % WARP_THREADS, warp = threadIdx.x / WARP_THREADS, num_warps = blockDim.x / WARP_THREADS;
    int stretch = (vocab_size + num_warps - 1) / num_warps;
    int begin = min(warp * stretch, vocab_size), end = min(begin + stretch, vocab_size);
    uint64 sum = 0;
    for (int i = begin + lane; i < end; i += WARP_THREADS) sum += weight_units(weights[i]);
    for (int bits = 16; bits; bits >>= 1) sum += __shfl_xor_sync(FULL_WARP, sum, bits);
    if (lane == 0) scratch.warps[warp] = sum;
    __syncthreads();
    uint64 before = 0;
    for (int w = 0; w < warp; w++) before += scratch.warps[w];
    if (target < before || target >= before + sum) return;  // a whole warp, and no barrier follows
    for (int base = begin; base < end; base += WARP_THREADS) {
        uint64 own = base + lane < end ? weight_units(weights[base + lane]) : 0, through = own;
        for (int distance = 1; distance < WARP_THREADS; distance *= 2) {
            uint64 lower = __shfl_up_sync(FULL_WARP, through, distance);
            if (lane >= distance) through += lower;
        }
        if (before + through - own <= target && target < before + through) *token = base + lane;
        before += __shfl_sync(FULL_WARP, through, WARP_THREADS - 1);
    }
}

// tokens[r]: the chosen id, or -1 where the best score is not finite. scratch_scores [rows, vocab_size].
KERNEL(SELECTION_THREADS) sample_rows(int* tokens, float* scratch_scores, const float* logits, const void* row_table,
                                      const int* ids, const float* values, const void* masks, int vocab_size) {
    SelectionScratch& scratch = *reinterpret_cast<SelectionScratch*>(SHARED_MEMORY);
    const SamplingRow row = static_cast<const SamplingRow*>(row_table)[blockIdx.x];
    float* scores = scratch_scores + (size_t)blockIdx.x * vocab_size;
    int* token = tokens + blockIdx.x;
    adjust_scores(scores, logits + (size_t)row.logits_row * vocab_size, row, ids, values,
                  static_cast<const unsigned*>(masks), vocab_size);
    int best = index_of_rank(best_rank(scores, vocab_size, scratch));
    float highest = scores[best];
    bool usable = highest - highest == 0.0f;  // neither NaN nor infinite
    if (!usable || row.temperature <= 0.0f) {
        if (threadIdx.x == 0) *token = usable ? best : -1;
        return;
    }
    __syncthreads();
    if (row.top_k > 0 && row.top_k < vocab_size) keep_largest(scores, vocab_size, row.top_k, scratch);
    uint64 total = 0;
    for (int i = threadIdx.x; i < vocab_size; i += blockDim.x) {
        // Subtracted before the division, so that a tiny temperature does not overflow.
        float weight = expf((scores[i] - highest) / row.temperature);
        if (row.top_p >= 1.0 && weight < row.min_p) weight = 0.0f;
        scores[i] = weight;
        total += weight_units(weight);
    }
    total = block_sum_integers(total, scratch);
    bool descending = row.top_p < 1.0;
    uint64 kept = descending ? kept_sum(scores, vocab_size, row, total, scratch) : total;
    uint64 target = (uint64)(row.uniform * (double)kept);
    if (target >= kept) target = kept - 1;
    if (descending)
        draw_descending(token, scores, vocab_size, target, scratch);
    else
        draw_by_id(token, scores, vocab_size, target, scratch);
}
KERNEL_ENTRY(sample_rows)

// tokens[r]: the first of the largest logits of row row_indices[r], or -1 where it is not finite.
KERNEL(SELECTION_THREADS) argmax_rows(int* tokens, const float* logits, const int* row_indices, int vocab_size) {
    SelectionScratch& scratch = *reinterpret_cast<SelectionScratch*>(SHARED_MEMORY);
    const float* row = logits + (size_t)row_indices[blockIdx.x] * vocab_size;
    int best = index_of_rank(best_rank(row, vocab_size, scratch));
    if (threadIdx.x == 0) tokens[blockIdx.x] = row[best] - row[best] == 0.0f ? best : -1;
}
KERNEL_ENTRY(argmax_rows)

// Log-softmax of a row at tokens[r] and at its num_top best tokens, best first, equals by id.
// chosen [rows], top_ids and top_values [rows, num_top].
KERNEL(SELECTION_THREADS) top_logprobs(float* chosen, int* top_ids, float* top_values, const float* logits,
                                       const int* row_indices, const int* tokens, int vocab_size, int num_top) {
    SelectionScratch& scratch = *reinterpret_cast<SelectionScratch*>(SHARED_MEMORY);
    const float* row = logits + (size_t)row_indices[blockIdx.x] * vocab_size;
    uint64 rank = best_rank(row, vocab_size, scratch);
    float highest = row[index_of_rank(rank)];
    uint64 units = 0;  // of 2^-40: exact sums, whatever the order
    for (int i = threadIdx.x; i < vocab_size; i += blockDim.x) units += weight_units(expf(row[i] - highest));
    units = block_sum_integers(units, scratch);
    float log_total = (float)log((double)units / (double)WEIGHT_UNIT);
    if (threadIdx.x == 0) chosen[blockIdx.x] = row[max(tokens[blockIdx.x], 0)] - highest - log_total;
    for (int n = 0; n < num_top; n++) {
        if (threadIdx.x == 0) {
            int id = index_of_rank(rank);
            top_ids[blockIdx.x * num_top + n] = id;
            top_values[blockIdx.x * num_top + n] = row[id] - highest - log_total;
        }
        uint64 next = 0;
        for (int i = threadIdx.x; i < vocab_size; i += blockDim.x) {
            uint64 other = rank_of(row[i], i);
            if (other < rank && other > next) next = other;
        }
        rank = block_max_integers(next, scratch);
    }
}
KERNEL_ENTRY(top_logprobs)
