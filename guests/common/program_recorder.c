#include "program_recorder.h"

#include "memory.h"
#include "report.h"

enum { MOST_OPERATIONS = 65536 };

static gp_program_header *program; /* its operations lie behind it */
static uint64_t program_size;      /* bytes reserved */
static uint32_t num_operations;
static bool missing_weight; /* reported */

bool recorder_open(uint32_t num_layers, uint32_t per_layer, uint32_t outside_layers) {
    if (num_layers > (MOST_OPERATIONS - outside_layers) / per_layer) {
        report_error("too many layers for one program: ", num_layers, "");
        return false;
    }
    program_size = sizeof *program + ((uint64_t)num_layers * per_layer + outside_layers) * sizeof(gp_operation);
    program = memory_take(program_size);
    if (!program)
        report_error("out of memory: program bytes: ", program_size, "");
    return program != NULL;
}

gp_operation *recorder_add(enum gp_opcode opcode, uint32_t out, uint32_t in) {
    gp_operation *operation = (gp_operation *)(program + 1) + num_operations++;
    *operation = (gp_operation){
        .opcode = (uint16_t)opcode,
        .out = out,
        .in = {in, GP_NO_VALUE},
        .tensors = {GP_NO_TENSOR, GP_NO_TENSOR, GP_NO_TENSOR},
    };
    return operation;
}

static uint32_t weight(const message *name) {
    int32_t handle = gp_tensor(name->text, name->length);
    if (handle >= 0)
        return (uint32_t)handle;
    message line = {.length = 0};
    message_text(message_text(message_text(&line, "the model has no weight \""), name->text), "\"");
    message_log(&line, GP_LOG_ERROR);
    missing_weight = true;
    return GP_NO_TENSOR;
}

uint32_t model_weight(const char *name) {
    message line = {.length = 0};
    return weight(message_text(&line, name));
}

uint32_t layer_weight(uint32_t layer, const char *name) {
    message line = {.length = 0};
    message_text(message_number(message_text(&line, "layers."), layer), ".");
    return weight(message_text(&line, name));
}

bool recorder_submit(enum gp_program_kind kind, uint32_t num_values) {
    if (missing_weight)
        return false;
    *program = (gp_program_header){{'G', 'P', 'R', 'G'}, GP_PROGRAM_VERSION, (uint16_t)kind, num_operations, num_values};
    uint32_t size = sizeof *program + num_operations * (uint32_t)sizeof(gp_operation);
    num_operations = 0;
    if (gp_program(program, size) == 0)
        return true;
    report_error("the host refused the program of kind ", kind, "");
    return false;
}

void recorder_close(void) {
    memset(program, 0, (size_t)program_size); /* a snapshot holds no leftovers */
    memory_give(program);
    program = NULL;
}
