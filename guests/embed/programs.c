#include "programs.h"

#include <stdint.h>

#include "assets.h"
#include "glowplug.h"
#include "memory.h"
#include "report.h"

enum { MOST_OPERATIONS = 65536, OPERATIONS_OUTSIDE_LAYERS = 7, OPERATIONS_PER_LAYER = 10 };

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

static gp_operation *operations;
static uint32_t num_operations;
static bool missing_weight; /* reported; recording runs on to name every missing weight at once */

static gp_operation *add(enum gp_opcode opcode, uint32_t out, uint32_t in) {
    gp_operation *operation = &operations[num_operations++];
    *operation = (gp_operation){
        .opcode = (uint16_t)opcode,
        .out = out,
        .in = {in, GP_NO_VALUE},
        .tensors = {GP_NO_TENSOR, GP_NO_TENSOR, GP_NO_TENSOR},
    };
    return operation;
}

static uint32_t weight(const char *prefix, const char *name) {
    message full = {.length = 0};
    message_text(message_text(&full, prefix), name);
    int32_t handle = gp_tensor(full.text, full.length);
    if (handle >= 0)
        return (uint32_t)handle;
    message line = {.length = 0};
    message_text(message_text(message_text(&line, "the model has no weight \""), prefix), name);
    message_log(message_text(&line, "\""), GP_LOG_ERROR);
    missing_weight = true;
    return GP_NO_TENSOR;
}

static void embed(enum gp_opcode opcode, uint32_t out, const char *table) {
    add(opcode, out, GP_NO_VALUE)->tensors[0] = weight(table, "");
}

static void sum(uint32_t left, uint32_t right) {
    add(GP_ADD, SUMMED, left)->in[1] = right;
}

static void layer_norm(const char *prefix, const char *scale, const char *shift) {
    gp_operation *operation = add(GP_LAYER_NORM, HIDDEN, SUMMED);
    operation->tensors[0] = weight(prefix, scale);
    operation->tensors[1] = weight(prefix, shift);
    operation->floats[0] = config.layer_norm_eps;
}

static void linear(uint32_t out, uint32_t in, uint32_t width, const char *prefix, const char *matrix,
                   const char *bias) {
    gp_operation *operation = add(GP_LINEAR, out, in);
    operation->tensors[0] = weight(prefix, matrix);
    operation->tensors[1] = weight(prefix, bias);
    operation->ints[0] = (int32_t)width;
}

static void attend(void) {
    gp_operation *operation = add(GP_ENCODER_ATTENTION, ATTENDED, QKV);
    operation->ints[0] = (int32_t)config.num_heads;
    operation->ints[1] = (int32_t)config.head_dim;
    operation->floats[0] = 1.0f / __builtin_sqrtf((float)config.head_dim);
}

/* Norms stand behind the sums, as in the first transformer. Source: Devlin et al. 2019, arXiv:1810.04805. */
static void layer(uint32_t index) {
    message prefix = {.length = 0};
    message_text(message_number(message_text(&prefix, "layers."), index), ".");
    prefix.text[prefix.length] = 0;
    linear(QKV, HIDDEN, 3 * config.hidden_size, prefix.text, "qkv.weight", "qkv.bias");
    attend();
    linear(PROJECTED, ATTENDED, config.hidden_size, prefix.text, "o.weight", "o.bias");
    sum(HIDDEN, PROJECTED);
    layer_norm(prefix.text, "attn_norm.weight", "attn_norm.bias");
    linear(WIDENED, HIDDEN, config.intermediate_size, prefix.text, "up.weight", "up.bias");
    add(GP_GELU, ACTIVATED, WIDENED);
    linear(PROJECTED, ACTIVATED, config.hidden_size, prefix.text, "down.weight", "down.bias");
    sum(HIDDEN, PROJECTED);
    layer_norm(prefix.text, "mlp_norm.weight", "mlp_norm.bias");
}

static void forward_pass(void) {
    bool normalises = (config.flags & CONFIG_NORMALISE) != 0;
    embed(GP_EMBED, HIDDEN, "embed.weight");
    embed(GP_POSITION_EMBED, POSITIONS, "position.weight");
    sum(HIDDEN, POSITIONS);
    layer_norm("embed_norm.", "weight", "bias");
    for (uint32_t index = 0; index < config.num_layers; index++)
        layer(index);
    add(GP_MEAN_POOL, POOLED, HIDDEN);
    if (normalises)
        add(GP_L2_NORMALISE, VECTORS, POOLED)->floats[0] = smallest_length;
    add(GP_OUTPUT, GP_NO_VALUE, normalises ? VECTORS : POOLED);
}

bool programs_record(void) {
    if (config.num_layers > (MOST_OPERATIONS - OPERATIONS_OUTSIDE_LAYERS) / OPERATIONS_PER_LAYER) {
        report_error("too many layers for one program: ", config.num_layers, "");
        return false;
    }
    uint64_t most = (uint64_t)config.num_layers * OPERATIONS_PER_LAYER + OPERATIONS_OUTSIDE_LAYERS;
    uint64_t size = sizeof(gp_program_header) + most * sizeof(gp_operation);
    gp_program_header *program = memory_take(size);
    if (!program) {
        report_error("out of memory: program bytes: ", size, "");
        return false;
    }
    operations = (gp_operation *)(program + 1);
    forward_pass();
    *program = (gp_program_header){{'G', 'P', 'R', 'G'}, GP_PROGRAM_VERSION, GP_ENCODE, num_operations, NUM_VALUES};
    bool recorded = !missing_weight;
    if (recorded && gp_program(program, sizeof *program + num_operations * (uint32_t)sizeof(gp_operation)) != 0) {
        report_error("the host refused the program of kind ", GP_ENCODE, "");
        recorded = false;
    }
    memset(program, 0, (size_t)size); /* a snapshot holds no leftovers */
    memory_give(program);
    operations = NULL;
    return recorded;
}
