/* A guest for tests: its tokens are bytes, and certain prompts and tokens misbehave on purpose. */
#include "glowplug.h"

#define BUFFER_BYTES 65536
#define MAX_SEQUENCES 4
#define STOP_TOKEN 256
#define UNKNOWN_FINISH 257
#define TRAP_TOKEN 258
#define WILD_POINTER_TOKEN 259

static uint8_t buffer[BUFFER_BYTES];
static uint32_t ids[BUFFER_BYTES];
static uint8_t text[BUFFER_BYTES];
static gp_push_result pushed;
static struct { int32_t open; uint32_t num_pushed; } sequences[MAX_SEQUENCES];
static int64_t seed;
static uint64_t num_inits;

static int starts_with(const char *value, int32_t length, const char *prefix) {
    for (int32_t i = 0; prefix[i]; i++)
        if (i >= length || value[i] != prefix[i]) return 0;
    return 1;
}

static int32_t recurse(volatile int32_t depth) { return depth < 0 ? 0 : recurse(depth + 1) + depth; }

static int32_t record(uint16_t kind) {
    struct { gp_program_header header; gp_operation output; } program = {
        {{'G', 'P', 'R', 'G'}, GP_PROGRAM_VERSION, kind, 1, 0},
        {.opcode = GP_OUTPUT, .out = GP_NO_VALUE, .in = {GP_NO_VALUE, GP_NO_VALUE},
         .tensors = {GP_NO_TENSOR, GP_NO_TENSOR, GP_NO_TENSOR}}};
    return gp_program(&program, sizeof program);
}

GP_EXPORT("gp_abi") int32_t gp_abi(void) { return GP_ABI_VERSION; }
GP_EXPORT("gp_init") int32_t gp_init(void) {
    num_inits++;
    gp_log(GP_LOG_INFO, "hello", 5);
    return record(GP_PREFILL) | record(GP_DECODE);
}
GP_EXPORT("gp_resume") int32_t gp_resume(int64_t value) { seed = value; return num_inits != 1; }
GP_EXPORT("gp_buffer") void *gp_buffer(int32_t size) { return (uint32_t)size <= sizeof buffer ? buffer : 0; }

GP_EXPORT("gp_tokenize") int64_t gp_tokenize(const char *value, int32_t length, int32_t flags) {
    if (starts_with(value, length, "trap!")) __builtin_trap();
    if (starts_with(value, length, "fail!")) return -1;
    if (starts_with(value, length, "wild!")) return gp_pack((void *)0x7fffff00, 64);
    if (starts_with(value, length, "host!")) gp_tensor("x", 1);
    if (starts_with(value, length, "log!")) gp_log(GP_LOG_INFO, value, (uint32_t)length);
    if (starts_with(value, length, "logwild!")) gp_log(GP_LOG_INFO, (const char *)0x7fffff00, 64);
    if (starts_with(value, length, "deep!")) return recurse(1);
    if (starts_with(value, length, "spin!")) for (volatile uint32_t n = 0;; n++) {}
    if (starts_with(value, length, "grow!")) {
        while (__builtin_wasm_memory_grow(0, 1) != (__SIZE_TYPE__)-1) {}
        ids[0] = __builtin_wasm_memory_size(0);
        return gp_pack(ids, 1);
    }
    uint32_t count = 0;
    if (flags & GP_ADD_SPECIAL) ids[count++] = STOP_TOKEN;
    for (int32_t i = 0; i < length; i++) ids[count++] = (uint8_t)value[i];
    return gp_pack(ids, count);
}

GP_EXPORT("gp_detokenize") int64_t gp_detokenize(const uint32_t *tokens, int32_t count, int32_t flags) {
    uint32_t length = 0;
    for (int32_t i = 0; i < count; i++) {
        if (tokens[i] < 256) text[length++] = (uint8_t)tokens[i];
        else if (flags & GP_SHOW_SPECIAL) text[length++] = '#';
    }
    return gp_pack(text, length);
}

GP_EXPORT("gp_token_bytes") int64_t gp_token_bytes(int32_t token) {
    if (token == 1000) return gp_pack(&seed, 8);
    if (token == 1001) return gp_pack(&num_inits, 8);
    if (token < 0 || token > 255) return -1;
    text[0] = (uint8_t)token;
    return gp_pack(text, 1);
}

GP_EXPORT("gp_sequence_open") int32_t gp_sequence_open(const void *stop, int32_t length, int32_t flags) {
    (void)stop, (void)length, (void)flags;
    for (int32_t i = 0; i < MAX_SEQUENCES; i++)
        if (!sequences[i].open) { sequences[i].open = 1; sequences[i].num_pushed = 0; return i; }
    return -1;
}

GP_EXPORT("gp_sequence_push") int64_t gp_sequence_push(int32_t sequence, int32_t token) {
    if (sequence < 0 || sequence >= MAX_SEQUENCES || !sequences[sequence].open) return -1;
    if (token == TRAP_TOKEN) __builtin_trap();
    if (token == WILD_POINTER_TOKEN) return gp_pack((void *)0x7fffff00, 12);
    text[0] = (uint8_t)token;
    text[1] = (uint8_t)('0' + ++sequences[sequence].num_pushed);
    pushed = (gp_push_result){(uint32_t)(uintptr_t)text, 2, 0};
    if (token == STOP_TOKEN) pushed = (gp_push_result){0, 0, GP_FINISH_STOP_TOKEN};
    if (token == UNKNOWN_FINISH) pushed.finish = 9;
    return gp_pack(&pushed, sizeof pushed);
}

GP_EXPORT("gp_sequence_flush") int64_t gp_sequence_flush(int32_t sequence) {
    text[0] = (uint8_t)('0' + sequences[sequence & 3].num_pushed);
    return gp_pack(text, 1);
}
GP_EXPORT("gp_sequence_close") void gp_sequence_close(int32_t sequence) { sequences[sequence & 3].open = 0; }
