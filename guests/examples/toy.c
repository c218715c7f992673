/* The smallest useful guest: a bigram language model without a tokeniser.
 *
 * The next token's scores depend on the last token alone: take its embedding, multiply it by an output matrix. That is
 *
 *     value 0 = EMBED(embed.weight)            [T, D]   rows for the step's tokens
 *     value 1 = LAST_ROWS(value 0)             [S, D]   the last token of each sequence
 *     value 2 = LINEAR(value 1, lm_head)       [S, V]   scores of all V possible next tokens
 *               OUTPUT(value 2)
 *
 * gp_init runs once, when the snapshot is built, and records this program for prefill and for decode. A snapshot then
 * keeps the guest's memory, so `vocabulary` still has its value in every worker although gp_init never runs there.
 *
 * Build: python -m guests.build
 */
#include "glowplug.h"

enum error { NO_CONFIG = 1, NO_TENSOR = 2, REFUSED = 3 };

static uint32_t vocabulary; /* V, from the asset "config": one little-endian u32 */
static int64_t resumed_with;

static int32_t fail(const char *reason, uint32_t length, enum error code) {
    gp_log(GP_LOG_ERROR, reason, length);
    return code;
}
#define FAIL(reason, code) fail(reason, sizeof(reason) - 1, code)

static gp_operation operation(enum gp_opcode opcode, uint32_t out, uint32_t in) {
    return (gp_operation){.opcode = (uint16_t)opcode,
                          .out = out,
                          .in = {in, GP_NO_VALUE},
                          .tensors = {GP_NO_TENSOR, GP_NO_TENSOR, GP_NO_TENSOR}};
}

static int32_t record(enum gp_program_kind kind, int32_t embed, int32_t lm_head) {
    struct {
        gp_program_header header;
        gp_operation operations[4];
    } program = {.header = {.magic = {'G', 'P', 'R', 'G'},
                            .version = GP_PROGRAM_VERSION,
                            .kind = (uint16_t)kind,
                            .num_operations = 4,
                            .num_values = 3}};
    program.operations[0] = operation(GP_EMBED, 0, GP_NO_VALUE);
    program.operations[0].tensors[0] = (uint32_t)embed;
    program.operations[1] = operation(GP_LAST_ROWS, 1, 0);
    program.operations[2] = operation(GP_LINEAR, 2, 1);
    program.operations[2].tensors[0] = (uint32_t)lm_head;
    program.operations[2].ints[0] = (int32_t)vocabulary;
    program.operations[3] = operation(GP_OUTPUT, GP_NO_VALUE, 2);
    return gp_program(&program, sizeof program);
}

GP_EXPORT("gp_abi") int32_t gp_abi(void) { return GP_ABI_VERSION; }

GP_EXPORT("gp_init") int32_t gp_init(void) {
    if (gp_asset_read("config", 6, 0, &vocabulary, sizeof vocabulary) != sizeof vocabulary)
        return FAIL("asset 'config' must hold the vocabulary size as a u32", NO_CONFIG);
    int32_t embed = gp_tensor("embed.weight", 12);
    int32_t lm_head = gp_tensor("lm_head.weight", 14);
    if (embed < 0 || lm_head < 0)
        return FAIL("the model needs the tensors embed.weight and lm_head.weight", NO_TENSOR);
    if (record(GP_PREFILL, embed, lm_head) != 0 || record(GP_DECODE, embed, lm_head) != 0)
        return FAIL("the host refused a program", REFUSED);
    return 0;
}

GP_EXPORT("gp_resume") int32_t gp_resume(int64_t seed) {
    resumed_with = seed;
    return vocabulary == 0; /* an instance that was never initialised cannot be resumed */
}

/* Not part of the ABI; a guest may export more, and the host never calls it. */
GP_EXPORT("toy_vocabulary") uint32_t toy_vocabulary(void) { return vocabulary; }
