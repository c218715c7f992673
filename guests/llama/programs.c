#include <stdint.h>

#include "assets.h"
#include "glowplug.h"
#include "lifecycle.h"
#include "program_recorder.h"

enum { OPERATIONS_OUTSIDE_LAYERS = 6, OPERATIONS_PER_LAYER = 16 };

/* Activations. Every layer uses the same ones, so a backend needs one buffer for each, whatever the depth. */
enum value {
    HIDDEN,    /* [T, D] residual stream */
    NORMED,    /* [T, D] */
    QKV,       /* [T, (H + 2 Hkv) Dh]: queries, keys, values */
    ATTENDED,  /* [T, H Dh] */
    PROJECTED, /* [T, D] what attention or the MLP adds to the stream */
    GATE_UP,   /* [T, 2 F] gate, up */
    ACTIVATED, /* [T, F] */
    LAST,      /* [S, D] the rows whose logits are wanted */
    LAST_NORMED,
    LOGITS, /* [S, V] */
    NUM_VALUES,
};

static bool has(enum config_flag flag) {
    return (config.flags & flag) != 0;
}

static void rms_norm(uint32_t out, uint32_t in, uint32_t norm) {
    gp_operation *operation = recorder_add(GP_RMS_NORM, out, in);
    operation->tensors[0] = norm;
    operation->floats[0] = config.rms_norm_eps;
}

static void linear(uint32_t out, uint32_t in, uint32_t width, uint32_t matrix, uint32_t bias) {
    gp_operation *operation = recorder_add(GP_LINEAR, out, in);
    operation->tensors[0] = matrix;
    operation->tensors[1] = bias;
    operation->ints[0] = (int32_t)width;
}

/* A linear layer whose bias, where the model has one, is called like its matrix. */
static void layer_linear(uint32_t layer, uint32_t out, uint32_t in, uint32_t width, const char *matrix,
                         const char *bias) {
    linear(out, in, width, layer_weight(layer, matrix), bias ? layer_weight(layer, bias) : GP_NO_TENSOR);
}

static void add_to_stream(void) {
    recorder_add(GP_ADD, HIDDEN, HIDDEN)->in[1] = PROJECTED;
}

static void head_norm(uint32_t column, uint32_t num_heads, uint32_t norm) {
    gp_operation *operation = recorder_add(GP_HEAD_RMS_NORM, QKV, QKV);
    operation->tensors[0] = norm;
    operation->ints[0] = (int32_t)column;
    operation->ints[1] = (int32_t)num_heads;
    operation->ints[2] = (int32_t)config.head_dim;
    operation->floats[0] = config.rms_norm_eps;
}

/* Queries and keys lie side by side, so one operation turns both. */
static void rope(void) {
    gp_operation *operation = recorder_add(GP_ROPE, QKV, QKV);
    operation->tensors[0] = model_weight("rope.inv_freq");
    operation->ints[0] = 0;
    operation->ints[1] = (int32_t)(config.num_heads + config.num_kv_heads);
    operation->ints[2] = (int32_t)config.head_dim;
    operation->floats[0] = config.rope_scale;
}

static void keep_keys_and_values(uint32_t layer) {
    gp_operation *operation = recorder_add(GP_KV_APPEND, GP_NO_VALUE, QKV);
    operation->ints[0] = (int32_t)layer;
    operation->ints[1] = (int32_t)(config.num_heads * config.head_dim);
    operation->ints[2] = (int32_t)((config.num_heads + config.num_kv_heads) * config.head_dim);
    operation->ints[3] = (int32_t)config.num_kv_heads;
    operation->ints[4] = (int32_t)config.head_dim;
}

static void attend(uint32_t layer) {
    gp_operation *operation = recorder_add(GP_ATTENTION, ATTENDED, QKV);
    operation->ints[0] = (int32_t)layer;
    operation->ints[1] = (int32_t)config.num_heads;
    operation->ints[2] = (int32_t)config.num_kv_heads;
    operation->ints[3] = (int32_t)config.head_dim;
    operation->ints[4] = layer < config.sliding_window_from_layer ? 0 : (int32_t)config.sliding_window;
    operation->floats[0] = 1.0f / __builtin_sqrtf((float)config.head_dim);
}

static void attention_block(uint32_t layer) {
    uint32_t qkv_width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim;
    rms_norm(NORMED, HIDDEN, layer_weight(layer, "attn_norm.weight"));
    layer_linear(layer, QKV, NORMED, qkv_width, "qkv.weight", has(CONFIG_QKV_BIAS) ? "qkv.bias" : 0);
    if (has(CONFIG_QK_NORM)) {
        head_norm(0, config.num_heads, layer_weight(layer, "q_norm.weight"));
        head_norm(config.num_heads * config.head_dim, config.num_kv_heads, layer_weight(layer, "k_norm.weight"));
    }
    rope();
    keep_keys_and_values(layer);
    attend(layer);
    layer_linear(layer, PROJECTED, ATTENDED, config.hidden_size, "o.weight", has(CONFIG_OUTPUT_BIAS) ? "o.bias" : 0);
    add_to_stream();
}

static void mlp_block(uint32_t layer) {
    uint32_t width = config.intermediate_size;
    rms_norm(NORMED, HIDDEN, layer_weight(layer, "mlp_norm.weight"));
    layer_linear(layer, GATE_UP, NORMED, 2 * width, "gate_up.weight", has(CONFIG_MLP_BIAS) ? "gate_up.bias" : 0);
    recorder_add(GP_SILU_MUL, ACTIVATED, GATE_UP)->ints[0] = (int32_t)width;
    layer_linear(layer, PROJECTED, ACTIVATED, config.hidden_size, "down.weight", has(CONFIG_MLP_BIAS) ? "down.bias" : 0);
    add_to_stream();
}

/* Prefill and decode are one pass: a decode step, too, may hold rows whose logits nobody wants (a prompt's chunk of one
 * token). A backend is free to bind the two differently. */
static void forward_pass(void) {
    uint32_t embedding = model_weight("embed.weight");
    recorder_add(GP_EMBED, HIDDEN, GP_NO_VALUE)->tensors[0] = embedding;
    for (uint32_t layer = 0; layer < config.num_layers; layer++) {
        attention_block(layer);
        mlp_block(layer);
    }
    recorder_add(GP_LAST_ROWS, LAST, HIDDEN);
    rms_norm(LAST_NORMED, LAST, model_weight("norm.weight"));
    uint32_t head = has(CONFIG_TIE_EMBEDDINGS) ? embedding : model_weight("lm_head.weight");
    linear(LOGITS, LAST_NORMED, config.vocab_size, head, GP_NO_TENSOR);
    recorder_add(GP_OUTPUT, GP_NO_VALUE, LOGITS);
}

static bool record(enum gp_program_kind kind) {
    forward_pass();
    return recorder_submit(kind, NUM_VALUES);
}

bool programs_record(void) {
    if (!recorder_open(config.num_layers, OPERATIONS_PER_LAYER, OPERATIONS_OUTSIDE_LAYERS))
        return false;
    bool recorded = record(GP_PREFILL) && record(GP_DECODE);
    recorder_close();
    return recorded;
}
