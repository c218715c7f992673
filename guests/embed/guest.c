/* The embed guest's exports: argument checks and packing only; what they do is in the files they call. */
#include "assets.h"
#include "glowplug.h"
#include "memory.h"
#include "programs.h"
#include "report.h"
#include "tokenize.h"

enum { FAILED = -1, ERROR_ASSETS = 1, ERROR_PROGRAMS = 2 };

static bool is_ready; /* gp_init has succeeded */

GP_EXPORT("gp_abi") int32_t gp_abi(void) {
    return GP_ABI_VERSION;
}

GP_EXPORT("gp_init") int32_t gp_init(void) {
    if (!assets_load())
        return ERROR_ASSETS;
    if (!programs_record())
        return ERROR_PROGRAMS;
    is_ready = true;
    return 0;
}

/* Nothing here is random and no host handle is kept, so a restored instance is ready as it is. */
GP_EXPORT("gp_resume") int32_t gp_resume(int64_t seed) {
    (void)seed;
    return is_ready ? 0 : FAILED;
}

GP_EXPORT("gp_buffer") void *gp_buffer(int32_t size) {
    static buffer input;
    return buffer_reserve(&input, 0, (uint32_t)size | 1) ? input.data : NULL;
}

GP_EXPORT("gp_tokenize") int64_t gp_tokenize(const uint8_t *text, int32_t length, int32_t flags) {
    static token_list ids;
    if (!is_ready)
        return FAILED;
    if ((uint32_t)length > TOKENIZE_MOST_BYTES) {
        report_error("a text may have 16777216 bytes, this one has ", (uint32_t)length, "");
        return FAILED;
    }
    if (!tokenize(text, (uint32_t)length, (uint32_t)flags, &ids)) {
        report_error("out of memory while tokenising; bytes of text: ", (uint32_t)length, "");
        return FAILED;
    }
    return gp_pack(ids.memory.data, ids.count);
}
