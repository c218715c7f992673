#include "lifecycle.h"

#include <stdint.h>

#include "glowplug.h"
#include "memory.h"

enum { ERROR_ASSETS = 1, ERROR_PROGRAMS = 2 };

static bool is_ready;

bool guest_is_ready(void) {
    return is_ready;
}

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

/* Nothing in these guests is random and no host handle is kept, so a restored instance is ready as it is. */
GP_EXPORT("gp_resume") int32_t gp_resume(int64_t seed) {
    (void)seed;
    return is_ready ? 0 : FAILED;
}

GP_EXPORT("gp_buffer") void *gp_buffer(int32_t size) {
    static buffer input;
    return buffer_reserve(&input, 0, (uint32_t)size | 1) ? input.data : NULL;
}
