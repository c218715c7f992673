/* glowplug guest ABI, version 1: what a guest author includes. The contract in words is guests/ABI.md.
 *
 * A guest is a freestanding wasm32 module. It is initialised once, when a snapshot is built: gp_init reads assets,
 * asks for tensors and records its programs. Its memory, globals and tables are then frozen into the snapshot, and
 * every later start continues from there: gp_init never runs again. Only gp_log may be called after gp_init returned;
 * the other imports trap.
 *
 * Build: python -m ziglang cc --target=wasm32-freestanding -mcpu=generic+simd128+bulk_memory -O2 -nostdlib -s
 *        -Wl,--no-entry -Wl,-z,stack-size=65536 -I guests/sdk guest.c -o guest.wasm
 */
#ifndef GLOWPLUG_H
#define GLOWPLUG_H

#include <stdint.h>

#define GP_ABI_VERSION 1

#define GP_IMPORT(name) __attribute__((import_module("glowplug"), import_name(name)))
#define GP_EXPORT(name) __attribute__((export_name(name), visibility("default")))

/* ---- imports: functions of the host ------------------------------------------------------------------------- */

enum gp_log_level { GP_LOG_DEBUG = 0, GP_LOG_INFO = 1, GP_LOG_WARNING = 2, GP_LOG_ERROR = 3 };

/* One line of UTF-8 text for the build log. Never put a user's text into it. The only import allowed after gp_init. */
GP_IMPORT("log") extern void gp_log(uint32_t level, const char *text, uint32_t length);

/* Size of an asset in bytes, or -1: there is none of that name. */
GP_IMPORT("asset_size") extern int64_t gp_asset_size(const char *name, uint32_t name_length);

/* Copy up to `length` bytes from `offset` of an asset to `destination`; the bytes copied (0 at the end), or -1: no
 * such asset. */
GP_IMPORT("asset_read")
extern int32_t gp_asset_read(const char *name, uint32_t name_length, int64_t offset, void *destination,
                             uint32_t length);

/* Handle of a weight for use in programs, or -1: the model has none of that name. Handles count up from 0 in the order
 * of first asking; asking again gives the same handle. */
GP_IMPORT("tensor") extern int32_t gp_tensor(const char *name, uint32_t name_length);

/* Make a tensor of zeros that programs may name: computed tables, biases, anything that is not a weight of the model. Its
 * handle (of the same count as gp_tensor's), or -1: the name is taken, by a weight or an earlier tensor. `shape` holds
 * one u32 for each of 1 to 8 dimensions; at most 1,024 tensors and 256 MiB in all. */
enum gp_tensor_type { GP_F32 = 0, GP_BF16 = 1 };
GP_IMPORT("tensor_alloc")
extern int32_t gp_tensor_alloc(const char *name, uint32_t name_length, uint32_t type, const uint32_t *shape,
                               uint32_t shape_bytes);

/* Write `length` bytes to byte `offset` of a tensor of gp_tensor_alloc's; 0. The snapshot keeps what stands there when
 * gp_init has returned. */
GP_IMPORT("tensor_write")
extern int32_t gp_tensor_write(int32_t handle, int64_t offset, const void *data, uint32_t length);

/* Record one program: a gp_program_header and its operations, `length` bytes together. Each kind at most once.
 * Returns 0; the host checks the program when gp_init has returned. */
GP_IMPORT("program") extern int32_t gp_program(const void *program, uint32_t length);

/* ---- exports: what a guest defines ---------------------------------------------------------------------------- */
/* Every guest:
 *
 *   GP_EXPORT("gp_abi")    int32_t gp_abi(void);              returns GP_ABI_VERSION
 *   GP_EXPORT("gp_init")   int32_t gp_init(void);             0, or an error code of its own (and a logged reason)
 *   GP_EXPORT("gp_resume") int32_t gp_resume(int64_t seed);   called first in every restored instance; 0 or an error
 *
 * A guest that reads text, the first two of these as well; one that writes text too, all of them. A packed result is
 * (pointer << 32 | length), or -1: failed; what it points to is valid until the next call.
 *
 *   GP_EXPORT("gp_buffer")         void *gp_buffer(int32_t size);   input buffer, at least size bytes; 0: out of memory
 *   GP_EXPORT("gp_tokenize")       int64_t gp_tokenize(const char *text, int32_t length, int32_t flags);
 *                                  packed (uint32_t ids, count)
 *   GP_EXPORT("gp_detokenize")     int64_t gp_detokenize(const uint32_t *ids, int32_t count, int32_t flags);
 *                                  packed (UTF-8 text, bytes); flags: GP_SHOW_SPECIAL
 *   GP_EXPORT("gp_token_bytes")    int64_t gp_token_bytes(int32_t token);  packed (raw bytes, count)
 *   GP_EXPORT("gp_sequence_open")  int32_t gp_sequence_open(const void *stop, int32_t length, int32_t flags);
 *                                  handle >= 0, or -1; stop: u32 count, then for each: u32 bytes, UTF-8 bytes
 *   GP_EXPORT("gp_sequence_push")  int64_t gp_sequence_push(int32_t sequence, int32_t token);
 *                                  packed (gp_push_result, sizeof)
 *   GP_EXPORT("gp_sequence_flush") int64_t gp_sequence_flush(int32_t sequence);  packed (UTF-8 text, bytes)
 *   GP_EXPORT("gp_sequence_close") void gp_sequence_close(int32_t sequence);
 */

enum gp_tokenize_flag { GP_ADD_SPECIAL = 1, GP_PARSE_SPECIAL = 2 };
/* KEEP_LEADING_SPACE: the sequence continues a text, so a space that its first token begins with belongs to it. */
enum gp_sequence_flag { GP_IGNORE_STOP_TOKENS = 1, GP_SHOW_SPECIAL = 2, GP_KEEP_LEADING_SPACE = 4 };
enum gp_finish { GP_FINISH_NONE = 0, GP_FINISH_STOP_TOKEN = 1, GP_FINISH_STOP_STRING = 2 };

/* What gp_sequence_push points to. Text never ends inside a UTF-8 character. */
typedef struct gp_push_result {
    uint32_t text;        /* pointer */
    uint32_t text_length; /* bytes */
    uint32_t finish;      /* enum gp_finish */
} gp_push_result;

static inline int64_t gp_pack(const void *pointer, uint32_t length) {
    return (int64_t)((uint64_t)(uintptr_t)pointer << 32 | length);
}

/* ---- tensor programs ------------------------------------------------------------------------------------------ */
/* Operations work on values: activation matrices [T, width], T tokens of the step, numbered from 0. What each opcode
 * reads and writes is in guests/ABI.md. */

#define GP_NO_VALUE 0xFFFFFFFFu
#define GP_NO_TENSOR 0xFFFFFFFFu
#define GP_PROGRAM_VERSION 1

/* A guest of a generating model records PREFILL and DECODE, an encoder's ENCODE alone. */
enum gp_program_kind { GP_PREFILL = 0, GP_DECODE = 1, GP_ENCODE = 2 };

enum gp_opcode {
    GP_EMBED = 1,
    GP_RMS_NORM = 2,
    GP_LINEAR = 3,
    GP_HEAD_RMS_NORM = 4,
    GP_ROPE = 5,
    GP_KV_APPEND = 6,
    GP_ATTENTION = 7,
    GP_SILU_MUL = 8,
    GP_ADD = 9,
    GP_LAST_ROWS = 10,
    GP_OUTPUT = 11,
    GP_LAYER_NORM = 12,
    GP_GELU = 13,
    GP_POSITION_EMBED = 14,
    GP_ENCODER_ATTENTION = 15,
    GP_MEAN_POOL = 16,
    GP_L2_NORMALISE = 17,
};

typedef struct gp_program_header {
    char magic[4]; /* "GPRG" */
    uint16_t version;
    uint16_t kind; /* enum gp_program_kind */
    uint32_t num_operations;
    uint32_t num_values;
} gp_program_header;

typedef struct gp_operation {
    uint16_t opcode;
    uint16_t flags; /* 0 */
    uint32_t out;
    uint32_t in[2];
    uint32_t reserved; /* 0 */
    uint32_t tensors[3];
    int32_t ints[6];
    float floats[2];
} gp_operation;

_Static_assert(sizeof(gp_program_header) == 16, "gp_program_header is 16 bytes");
_Static_assert(sizeof(gp_operation) == 64, "gp_operation is 64 bytes");
_Static_assert(sizeof(gp_push_result) == 12, "gp_push_result is 12 bytes");

#endif
