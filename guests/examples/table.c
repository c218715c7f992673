/* A guest with a big table: what the restore benchmark restores, and how init's work outlives the process it ran in.
 *
 * gp_init fills as many MiB as the asset "size" says (one little-endian u32) with numbers that depend on their index
 * alone. A restored instance answers from that table without having made it: gp_token_bytes(i) is entry i. The other
 * functions are the smallest tokeniser that the ABI accepts: a token is a byte.
 *
 * Build: python -m guests.build
 */
#include "glowplug.h"

#define PAGE_BYTES 65536u
#define MEBIBYTE 1048576u
#define BUFFER_BYTES 4096u
#define CALLS 10000

enum error { NO_SIZE = 1, NO_MEMORY = 2, REFUSED = 3 };

static uint64_t *table; /* num_entries numbers */
static uint32_t num_entries;
static uint8_t buffer[BUFFER_BYTES];
static uint32_t ids[BUFFER_BYTES];
static gp_push_result pushed;
static int64_t seed;

static uint64_t entry(uint32_t index) { return (index + 1) * 0x9E3779B97F4A7C15ull; }

static int32_t record(enum gp_program_kind kind) {
    struct {
        gp_program_header header;
        gp_operation output;
    } program = {{{'G', 'P', 'R', 'G'}, GP_PROGRAM_VERSION, (uint16_t)kind, 1, 0},
                 {.opcode = GP_OUTPUT,
                  .out = GP_NO_VALUE,
                  .in = {GP_NO_VALUE, GP_NO_VALUE},
                  .tensors = {GP_NO_TENSOR, GP_NO_TENSOR, GP_NO_TENSOR}}};
    return gp_program(&program, sizeof program);
}

GP_EXPORT("gp_abi") int32_t gp_abi(void) { return GP_ABI_VERSION; }

GP_EXPORT("gp_init") int32_t gp_init(void) {
    uint32_t mebibytes;
    if (gp_asset_read("size", 4, 0, &mebibytes, sizeof mebibytes) != sizeof mebibytes || mebibytes > 511)
        return NO_SIZE;
    uint32_t old_pages = __builtin_wasm_memory_grow(0, mebibytes * (MEBIBYTE / PAGE_BYTES));
    if (old_pages == 0xFFFFFFFFu)
        return NO_MEMORY;
    table = (uint64_t *)(uintptr_t)(old_pages * PAGE_BYTES);
    num_entries = mebibytes * (MEBIBYTE / sizeof *table);
    for (uint32_t i = 0; i < num_entries; i++)
        table[i] = entry(i);
    return record(GP_PREFILL) != 0 || record(GP_DECODE) != 0 ? REFUSED : 0;
}

GP_EXPORT("gp_resume") int32_t gp_resume(int64_t value) {
    seed = value;
    return num_entries == 0;
}

GP_EXPORT("gp_token_bytes") int64_t gp_token_bytes(int32_t token) {
    return (uint32_t)token < num_entries ? gp_pack(&table[token], sizeof *table) : -1;
}

GP_EXPORT("gp_buffer") void *gp_buffer(int32_t size) { return (uint32_t)size <= BUFFER_BYTES ? buffer : 0; }

GP_EXPORT("gp_tokenize") int64_t gp_tokenize(const uint8_t *text, int32_t length, int32_t flags) {
    (void)flags;
    for (int32_t i = 0; i < length; i++)
        ids[i] = text[i];
    return gp_pack(ids, (uint32_t)length);
}

GP_EXPORT("gp_detokenize") int64_t gp_detokenize(const uint32_t *tokens, int32_t count, int32_t flags) {
    (void)flags;
    for (int32_t i = 0; i < count; i++)
        buffer[i] = (uint8_t)tokens[i]; /* never ahead of what is still to be read */
    return gp_pack(buffer, (uint32_t)count);
}

GP_EXPORT("gp_sequence_open") int32_t gp_sequence_open(const void *stop, int32_t length, int32_t flags) {
    (void)stop, (void)length, (void)flags;
    return 0;
}

GP_EXPORT("gp_sequence_push") int64_t gp_sequence_push(int32_t sequence, int32_t token) {
    (void)sequence;
    buffer[0] = (uint8_t)token;
    pushed = (gp_push_result){(uint32_t)(uintptr_t)buffer, 1, GP_FINISH_NONE};
    return gp_pack(&pushed, sizeof pushed);
}

GP_EXPORT("gp_sequence_flush") int64_t gp_sequence_flush(int32_t sequence) {
    (void)sequence;
    return gp_pack(buffer, 0);
}

GP_EXPORT("gp_sequence_close") void gp_sequence_close(int32_t sequence) { (void)sequence; }

/* For measuring host calls: ten thousand of each, with three and with five arguments. */
GP_EXPORT("bench_log") void bench_log(void) {
    for (int32_t i = 0; i < CALLS; i++)
        gp_log(GP_LOG_DEBUG, (const char *)buffer, 16);
}

GP_EXPORT("bench_asset_read") void bench_asset_read(void) {
    for (int32_t i = 0; i < CALLS; i++)
        gp_asset_read("size", 4, 0, buffer, 16);
}
