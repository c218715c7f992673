#include <stdint.h>

#include "assets.h"
#include "glowplug.h"
#include "lifecycle.h"
#include "program_recorder.h"

enum { OPERATIONS_OUTSIDE_LAYERS = 7, OPERATIONS_PER_LAYER = 10 };

static const float smallest_length = 1e-12f; /* a vector of zeros stays one. Source: torch.nn.functional.normalize */

/* Activations. Every layer uses the same ones, so a backend needs one buffer for each, whatever the depth. */
enum value {
    HIDDEN,    /* [T, D] residual stream */
    POSITIONS, /* [T, D] */
    SUMMED,    /* [T, D] the stream before its norm */
    QKV,       /* [T, 3 D]: queries, keys, values */
    ATTENDED,  /* [T, D] */
    PROJECTED, /* [T, D] what attention or the MLP adds to the stream */
    WIDENED,   /* [T, F] */
    ACTIVATED, /* [T, F] */
    POOLED,    /* [S, D] */
    VECTORS,   /* [S, D] */
    NUM_VALUES,
};

static void embed(enum gp_opcode opcode, uint32_t out, const char *table) {
    recorder_add(opcode, out, GP_NO_VALUE)->tensors[0] = model_weight(table);
}

static void sum(uint32_t left, uint32_t right) {
    recorder_add(GP_ADD, SUMMED, left)->in[1] = right;
}

static void layer_norm(uint32_t scale, uint32_t shift) {
    gp_operation *operation = recorder_add(GP_LAYER_NORM, HIDDEN, SUMMED);
    operation->tensors[0] = scale;
    operation->tensors[1] = shift;
    operation->floats[0] = config.layer_norm_eps;
}

static void linear(uint32_t out, uint32_t in, uint32_t width, uint32_t matrix, uint32_t bias) {
    gp_operation *operation = recorder_add(GP_LINEAR, out, in);
    operation->tensors[0] = matrix;
    operation->tensors[1] = bias;
    operation->ints[0] = (int32_t)width;
}

static void attend(void) {
    gp_operation *operation = recorder_add(GP_ENCODER_ATTENTION, ATTENDED, QKV);
    operation->ints[0] = (int32_t)config.num_heads;
    operation->ints[1] = (int32_t)config.head_dim;
    operation->floats[0] = 1.0f / __builtin_sqrtf((float)config.head_dim);
}

/* Norms stand behind the sums, as in the first transformer. Source: Devlin et al. 2019, arXiv:1810.04805. */
static void layer(uint32_t index) {
    linear(QKV, HIDDEN, 3 * config.hidden_size, layer_weight(index, "qkv.weight"), layer_weight(index, "qkv.bias"));
    attend();
    linear(PROJECTED, ATTENDED, config.hidden_size, layer_weight(index, "o.weight"), layer_weight(index, "o.bias"));
    sum(HIDDEN, PROJECTED);
    layer_norm(layer_weight(index, "attn_norm.weight"), layer_weight(index, "attn_norm.bias"));
    linear(WIDENED, HIDDEN, config.intermediate_size, layer_weight(index, "up.weight"), layer_weight(index, "up.bias"));
    recorder_add(GP_GELU, ACTIVATED, WIDENED);
    linear(PROJECTED, ACTIVATED, config.hidden_size, layer_weight(index, "down.weight"), layer_weight(index, "down.bias"));
    sum(HIDDEN, PROJECTED);
    layer_norm(layer_weight(index, "mlp_norm.weight"), layer_weight(index, "mlp_norm.bias"));
}

static void forward_pass(void) {
    bool normalises = (config.flags & CONFIG_NORMALISE) != 0;
    embed(GP_EMBED, HIDDEN, "embed.weight");
    embed(GP_POSITION_EMBED, POSITIONS, "position.weight");
    sum(HIDDEN, POSITIONS);
    layer_norm(model_weight("embed_norm.weight"), model_weight("embed_norm.bias"));
    for (uint32_t index = 0; index < config.num_layers; index++)
        layer(index);
    recorder_add(GP_MEAN_POOL, POOLED, HIDDEN);
    if (normalises)
        recorder_add(GP_L2_NORMALISE, VECTORS, POOLED)->floats[0] = smallest_length;
    recorder_add(GP_OUTPUT, GP_NO_VALUE, normalises ? VECTORS : POOLED);
}

bool programs_record(void) {
    if (!recorder_open(config.num_layers, OPERATIONS_PER_LAYER, OPERATIONS_OUTSIDE_LAYERS))
        return false;
    forward_pass();
    bool recorded = recorder_submit(GP_ENCODE, NUM_VALUES);
    recorder_close();
    return recorded;
}
