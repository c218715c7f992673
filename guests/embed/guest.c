/* The embed guest's exports: argument checks and packing only; what they do is in the files they call. */
#include "assets.h"
#include "glowplug.h"
#include "lifecycle.h"
#include "memory.h"
#include "report.h"
#include "tokenize.h"

GP_EXPORT("gp_tokenize") int64_t gp_tokenize(const uint8_t *text, int32_t length, int32_t flags) {
    static token_list ids;
    if (!guest_is_ready())
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
