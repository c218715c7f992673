/* A guest that computes a tensor of its own: the bigram model of toy.c that never says certain tokens.
 *
 * The weights are the model's, and shared with every other guest over them. The bias is this guest's: 0 for tokens that
 * it allows, minus a lot for those in its list. It is computed once, at init; the snapshot keeps it, and workers map it
 * read-only beside the weights.
 *
 * Build: python -m guests.build
 */
#include "glowplug.h"

enum error { NO_CONFIG = 1, NO_TENSOR = 2, REFUSED = 3 };

static const float NEVER = -1e9f;
static const uint32_t FORBIDDEN[] = {0, 1, 2};

static int32_t fail(const char *reason, uint32_t length, enum error code) {
    gp_log(GP_LOG_ERROR, reason, length);
    return code;
}
#define FAIL(reason, code) fail(reason, sizeof(reason) - 1, code)

static gp_operation operation(enum gp_opcode opcode, uint32_t out, uint32_t in, int32_t weight, int32_t bias) {
    return (gp_operation){.opcode = (uint16_t)opcode,
                          .out = out,
                          .in = {in, GP_NO_VALUE},
                          .tensors = {(uint32_t)weight, (uint32_t)bias, GP_NO_TENSOR}};
}

static int32_t record(enum gp_program_kind kind, uint32_t vocabulary, int32_t embed, int32_t bias) {
    struct {
        gp_program_header header;
        gp_operation operations[4];
    } program = {.header = {.magic = {'G', 'P', 'R', 'G'},
                            .version = GP_PROGRAM_VERSION,
                            .kind = (uint16_t)kind,
                            .num_operations = 4,
                            .num_values = 3}};
    program.operations[0] = operation(GP_EMBED, 0, GP_NO_VALUE, embed, -1);
    program.operations[1] = operation(GP_LAST_ROWS, 1, 0, -1, -1);
    program.operations[2] = operation(GP_LINEAR, 2, 1, embed, bias);
    program.operations[2].ints[0] = (int32_t)vocabulary;
    program.operations[3] = operation(GP_OUTPUT, GP_NO_VALUE, 2, -1, -1);
    return gp_program(&program, sizeof program);
}

/* The tensor "bias" [V]; its handle, or -1. */
static int32_t make_bias(uint32_t vocabulary) {
    int32_t bias = gp_tensor_alloc("bias", 4, GP_F32, &vocabulary, sizeof vocabulary);
    for (uint32_t i = 0; bias >= 0 && i < sizeof FORBIDDEN / sizeof *FORBIDDEN; i++)
        if (FORBIDDEN[i] < vocabulary)
            gp_tensor_write(bias, (int64_t)FORBIDDEN[i] * 4, &NEVER, sizeof NEVER);
    return bias;
}

GP_EXPORT("gp_abi") int32_t gp_abi(void) { return GP_ABI_VERSION; }

GP_EXPORT("gp_init") int32_t gp_init(void) {
    uint32_t vocabulary = 0;
    /* Where the asset "config" of Llama-family models has it; see llama/assets.h. */
    if (gp_asset_read("config", 6, 32, &vocabulary, sizeof vocabulary) != sizeof vocabulary)
        return FAIL("asset 'config' must hold the vocabulary size at byte 32", NO_CONFIG);
    int32_t embed = gp_tensor("embed.weight", 12);
    if (embed < 0)
        return FAIL("the model needs the tensor embed.weight", NO_TENSOR);
    int32_t bias = make_bias(vocabulary);
    if (bias < 0)
        return FAIL("the model has a tensor named bias", NO_TENSOR);
    if (record(GP_PREFILL, vocabulary, embed, bias) != 0 || record(GP_DECODE, vocabulary, embed, bias) != 0)
        return FAIL("the host refused a program", REFUSED);
    return 0;
}

GP_EXPORT("gp_resume") int32_t gp_resume(int64_t seed) { return (void)seed, 0; }
